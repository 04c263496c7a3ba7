# The temperature schedule is as long a part of the training as the paper's, 20 of 300 epochs.
_base_ = 'faster-rcnn_mobilenet-v2_fpn_1xb4-24e_320x240-scratch.py'

model = dict(backbone=dict(static=False, kw_cfg=dict(cell_num_ratio=1, attn_norm='LN')))
custom_hooks = [
    dict(type='RandomStateHook'), dict(type='KWMixingHook', interval=50),
    dict(type='KWTemperatureHook', iters=117),
]
