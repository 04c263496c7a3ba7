# A KW-ResNet18 Semantic FPN, trained from scratch on the label maps of the generated shapes data
# set in minutes on two CPU cores. The images are small, so the last stage, at a 32nd of their size,
# is left out; the others have three eighths of the usual width. The temperature schedule is a
# shorter part of the training than the paper's, 20 of 300 epochs.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py',
    '../_base_/datasets/shapes_semantic.py',
    '../_base_/schedules/shapes.py',
    '../_base_/seg_runtime.py',
]

# Each process has four images: with batch norms the loss falls more slowly.
norm_cfg = dict(type='GN', num_groups=8)
channels = 48
# Most pixels are background, but what takes long to learn is to tell the shapes apart.
class_weight = [0.3, 1, 1, 1, 1]
model = dict(
    data_preprocessor=dict(size_divisor=32),
    pretrained=None,
    backbone=dict(
        type='KWResNet',
        depth=18,
        base_channels=24,
        num_stages=3,
        out_indices=(0, 1, 2),
        norm_cfg=norm_cfg,
        kw_cfg=dict(cell_num_ratio=1, attn_norm='LN')),
    neck=dict(
        in_channels=[24, 48, 96], out_channels=channels, num_outs=3, norm_cfg=norm_cfg),
    decode_head=dict(
        in_channels=[channels] * 3,
        in_index=[0, 1, 2],
        feature_strides=[4, 8, 16],
        channels=channels,
        dropout_ratio=0,
        num_classes=5,
        norm_cfg=norm_cfg,
        loss_decode=dict(class_weight=class_weight)),
    # What a shape is shows at the coarsest level, where it is to be learned directly.
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=channels,
        in_index=2,
        channels=channels,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0,
        num_classes=5,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(
            type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4,
            class_weight=class_weight)))

train_dataloader = dict(batch_size=8)
# Fused: one call for all parameters; one by one, so small a model's take a tenth of the time.
optim_wrapper = dict(optimizer=dict(lr=3e-3, fused=True))
max_epochs = 14
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, convert_to_iter_based=True,
         eta_min=1e-5),
]
custom_hooks = [dict(type='RandomStateHook'), dict(type='KWTemperatureHook', iters=50)]
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=10),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
log_processor = dict(by_epoch=True)
