# The logit is 4, and the temperature holds the start for half of the training.
_base_ = '../../../configs/small_data/faster-rcnn_kw1x-mobilenet-v2_fpn_1xb4-8e_320x240.py'

custom_imports = dict(imports=['kw_mm', 'tried_starts'], allow_failed_imports=False)
model = dict(backbone=dict(init_cfg=dict(type='TriedStart')))
custom_hooks = [
    dict(type='RandomStateHook'), dict(type='KWMixingHook', interval=50),
    dict(type='KWTemperatureHook', epochs=4),
]
