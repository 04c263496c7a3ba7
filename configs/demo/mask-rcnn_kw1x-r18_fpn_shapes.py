# A KW-ResNet18 Mask R-CNN of quarter width with slim heads, trained from scratch on the generated
# shapes data set in minutes on two CPU cores. The temperature schedule is about as long a part of
# the training as the paper's, 20 of 300 epochs.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/shapes_instance.py',
    '../_base_/schedules/shapes.py',
    '../_base_/runtime.py',
]

model = dict(
    backbone=dict(
        type='KWResNet',
        depth=18,
        base_channels=16,
        frozen_stages=-1,
        norm_eval=False,
        # Two processes of three images: too few for the attention's batch norm.
        kw_cfg=dict(cell_num_ratio=1, attn_norm='LN'),
        init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=64, num_outs=4,
              norm_cfg=dict(type='BN')),
    rpn_head=dict(
        in_channels=64,
        feat_channels=64,
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    # Levels for boxes of this size, not for those of COCO's large images.
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64, finest_scale=28,
                                roi_layer=dict(sampling_ratio=2)),
        bbox_head=dict(in_channels=64, fc_out_channels=256, num_classes=4,
                       reg_class_agnostic=True),
        mask_roi_extractor=dict(out_channels=64, finest_scale=28,
                                roi_layer=dict(sampling_ratio=2)),
        mask_head=dict(in_channels=64, conv_out_channels=64, num_convs=2, num_classes=4,
                       class_agnostic=True, norm_cfg=dict(type='GN', num_groups=8))),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(max_per_img=30)))

train_dataloader = dict(batch_size=6)
max_epochs = 4
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=max_epochs)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=30),
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, convert_to_iter_based=True,
         eta_min=1e-5),
]
custom_hooks = [dict(type='RandomStateHook'), dict(type='KWTemperatureHook', iters=50)]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=2))
