# 12 epochs with batches of 16 (8 GPUs x 2), steps at 8 and 11, linear warm-up over 500 iterations.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

optim_wrapper = dict(
    _delete_=True,
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # By name, so of the backbone's norms only the attentions' are spared: ``bn*`` do decay.
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.)}))
