_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py',
    '../_base_/datasets/coco-detection_ms-crop.py',
    '../_base_/schedules/adamw-layerwise-1x.py',
    '../_base_/runtime.py',
]

model = dict(
    backbone=dict(
        _delete_=True,
        type='KWConvNeXt',
        arch='tiny',
        out_indices=(1, 2, 3),
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        kw_cfg=dict(cell_num_ratio=1),
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://convnext_tiny')),
    neck=dict(in_channels=[192, 384, 768], start_level=0))
