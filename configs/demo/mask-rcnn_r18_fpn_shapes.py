# The static twin of the demo's detector.
_base_ = 'mask-rcnn_kw1x-r18_fpn_shapes.py'

model = dict(backbone=dict(static=True, kw_cfg=None))
custom_hooks = [dict(type='RandomStateHook')]
