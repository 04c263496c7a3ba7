# The static baseline: the static twin of KWConvNeXt in the place of mmpretrain's ConvNeXt.
_base_ = [
    'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
    '../_base_/backbones/convnext-t.py',
]

custom_imports = dict(imports=['kw_mm'], allow_failed_imports=False)
custom_hooks = [dict(type='RandomStateHook')]
model = dict(backbone=dict(_delete_=True, static=True, **_base_.convnext))
