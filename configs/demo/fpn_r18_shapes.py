# The static twin of the demo's segmentor.
_base_ = 'fpn_kw1x-r18_shapes.py'

model = dict(backbone=dict(static=True, kw_cfg=None))
custom_hooks = [dict(type='RandomStateHook')]
