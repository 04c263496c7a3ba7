# The static baseline: that of 80k iterations, half as long.
_base_ = 'upernet_convnext-t_8xb1-amp-80k_cityscapes-512x1024.py'

max_iters = 40000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, begin=1500, end=max_iters, eta_min=0.0, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=max_iters // 10))
