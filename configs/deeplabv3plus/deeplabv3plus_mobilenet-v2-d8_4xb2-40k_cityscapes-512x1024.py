# The static baseline: that of 80k iterations, half as long.
_base_ = 'deeplabv3plus_mobilenet-v2-d8_4xb2-80k_cityscapes-512x1024.py'

max_iters = 40000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
param_scheduler = [
    dict(type='PolyLR', eta_min=1e-4, power=0.9, begin=0, end=max_iters, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=max_iters // 10))
