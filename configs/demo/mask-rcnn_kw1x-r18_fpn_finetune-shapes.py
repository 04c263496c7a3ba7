# One more epoch from trained weights (load_from), at a third of the rate and temperature 0.
_base_ = 'mask-rcnn_kw1x-r18_fpn_shapes.py'

max_epochs = 1
train_cfg = dict(max_epochs=max_epochs, val_interval=max_epochs)
optim_wrapper = dict(optimizer=dict(lr=3e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=30),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, convert_to_iter_based=True,
         eta_min=1e-5),
]
custom_hooks = [dict(type='RandomStateHook')]
