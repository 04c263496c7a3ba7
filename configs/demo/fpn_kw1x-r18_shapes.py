# A KW-ResNet18 Semantic FPN of quarter width, trained from scratch on the label maps of the
# generated shapes data set in minutes on two CPU cores. The temperature schedule is about as long
# a part of the training as the paper's, 20 of 300 epochs.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/shapes.py',
    '../_base_/seg_runtime.py',
]

model = dict(
    data_preprocessor=dict(size_divisor=32),
    pretrained=None,
    backbone=dict(
        type='KWResNet',
        depth=18,
        base_channels=16,
        norm_cfg=dict(type='BN'),
        # As in the demo of detection, where two processes have three images each.
        kw_cfg=dict(cell_num_ratio=1, attn_norm='LN')),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64, norm_cfg=dict(type='BN')),
    decode_head=dict(
        in_channels=[64, 64, 64, 64],
        channels=64,
        dropout_ratio=0,
        num_classes=5,
        norm_cfg=dict(type='BN')))

train_dataloader = dict(batch_size=8)
max_epochs = 8
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=30),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, convert_to_iter_based=True,
         eta_min=1e-5),
]
custom_hooks = [dict(type='RandomStateHook'), dict(type='KWTemperatureHook', iters=50)]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=10),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
log_processor = dict(by_epoch=True)
