# The static baseline: the static twin of KWConvNeXt in the place of mmpretrain's ConvNeXt.
_base_ = 'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'

custom_imports = dict(imports=['kw_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='RandomStateHook')]
model = dict(
    backbone=dict(
        _delete_=True,
        type='KWConvNeXt',
        arch='tiny',
        static=True,
        drop_path_rate=0.4,
        layer_scale_init_value=1.0,
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://convnext_tiny')))
