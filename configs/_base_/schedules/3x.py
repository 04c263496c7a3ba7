# What 36 epochs change in a recipe of 12: train_cfg and param_scheduler.
schedule_3x = dict(
    train_cfg=dict(max_epochs=36),
    param_scheduler=[
        dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
        dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
    ])
