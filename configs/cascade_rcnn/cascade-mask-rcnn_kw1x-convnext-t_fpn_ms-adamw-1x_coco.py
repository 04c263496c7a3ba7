_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layerwise-1x.py',
    '../_base_/runtime.py',
    '../_base_/backbones/convnext-t.py',
]

model = dict(
    backbone=dict(_delete_=True, kw_cfg=dict(cell_num_ratio=1), **_base_.convnext),
    neck=dict(in_channels=[96, 192, 384, 768]))
