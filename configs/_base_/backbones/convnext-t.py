# ConvNeXt-T with the drop path and layer scale of the paper's detectors, dynamic unless a config
# says static=True: model = dict(backbone=dict(_delete_=True, **_base_.convnext)).
convnext = dict(
    type='KWConvNeXt',
    arch='tiny',
    drop_path_rate=0.4,
    layer_scale_init_value=1.0,
    init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://convnext_tiny'))
