_base_ = 'dino-4scale_kw1x-r50_8xb2-12e_coco.py'

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
    neck=dict(in_channels=[192, 384, 768]))
