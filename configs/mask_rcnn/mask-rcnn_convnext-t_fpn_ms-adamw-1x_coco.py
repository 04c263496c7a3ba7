# The static baseline: the static twin of KWConvNeXt.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layerwise-1x.py',
    '../_base_/runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='KWConvNeXt',
        arch='tiny',
        static=True,
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://convnext_tiny')),
    neck=dict(in_channels=[96, 192, 384, 768]))
