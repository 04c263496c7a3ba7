_base_ = 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py'

custom_imports = dict(imports=['kw_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='RandomStateHook')]
model = dict(
    backbone=dict(
        type='KWResNet',
        drop_path_rate=0.1,
        kw_cfg=dict(cell_num_ratio=1),
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://resnet50')))
