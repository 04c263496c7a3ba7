# The static baseline: that of 160k iterations, half as long.
_base_ = 'upernet_convnext-t_8xb2-amp-160k_ade20k-512x512.py'

max_iters = 80000
train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, begin=1500, end=max_iters, eta_min=0.0, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=max_iters // 10))
