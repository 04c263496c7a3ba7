_base_ = [
    'dino-4scale_kw1x-r50_8xb2-12e_coco.py',
    '../_base_/backbones/convnext-t.py',
]

model = dict(
    backbone=dict(
        _delete_=True, out_indices=(1, 2, 3), kw_cfg=dict(cell_num_ratio=1), **_base_.convnext),
    neck=dict(in_channels=[192, 384, 768]))
