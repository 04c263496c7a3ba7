# The same from random weights, with three times as many epochs and batch norms that train.
_base_ = 'faster-rcnn_mobilenet-v2_fpn_1xb4-8e_320x240.py'

model = dict(backbone=dict(norm_eval=False, init_cfg=None))
max_epochs = 24
train_cfg = dict(max_epochs=max_epochs, val_interval=6)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, convert_to_iter_based=True,
         eta_min_ratio=0.02),
]
