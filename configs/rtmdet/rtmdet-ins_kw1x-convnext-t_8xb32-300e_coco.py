_base_ = [
    'rtmdet-ins_kw1x-r50_8xb32-300e_coco.py',
    '../_base_/backbones/convnext-t.py',
]

model = dict(
    backbone=dict(
        _delete_=True, out_indices=(1, 2, 3), kw_cfg=dict(cell_num_ratio=1), **_base_.convnext),
    neck=dict(in_channels=[192, 384, 768]))
# A quarter of RTMDet's rate for a backbone that starts from pretrained weights.
optim_wrapper = dict(
    constructor='LearningRateDecayOptimizerConstructor',
    optimizer=dict(lr=0.001),
    paramwise_cfg=dict(_delete_=True, decay_rate=0.8, decay_type='layer_wise', num_layers=6))
