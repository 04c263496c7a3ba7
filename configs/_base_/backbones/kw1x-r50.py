# What turns the ResNet50 of a detector's base config into KW-ResNet50; freezing, norms and outputs
# stay: model = dict(backbone=_base_.kw_backbone).
kw_backbone = dict(
    type='KWResNet',
    drop_path_rate=0.1,
    kw_cfg=dict(cell_num_ratio=1),
    init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://resnet50'))
