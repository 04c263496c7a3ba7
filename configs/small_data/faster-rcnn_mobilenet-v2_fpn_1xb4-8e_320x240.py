# A Faster R-CNN for a few hundred images with boxes, trained in minutes without a GPU: MobileNetV2
# from ImageNet weights, slim heads, images of 320 x 240 pixels.
_base_ = [
    'mmdet::_base_/models/faster-rcnn_r50_fpn.py',
    'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/runtime.py',
]

# ---------------------------------------------------------------------------------------------
data_root = 'data/my_data/'
metainfo = dict(classes=('circle', 'square', 'triangle', 'ring'))
train_files = dict(ann_file='annotations/instances_train.json', data_prefix=dict(img='train/'))
val_files = dict(ann_file='annotations/instances_val.json', data_prefix=dict(img='val/'))
scale = (320, 240)
# ---------------------------------------------------------------------------------------------

channels = 64
model = dict(
    backbone=dict(
        _delete_=True,
        type='KWMobileNetV2',
        static=True,
        norm_eval=True,
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://mobilenet_v2')),
    neck=dict(in_channels=[24, 32, 96, 1280], out_channels=channels, num_outs=4),
    rpn_head=dict(
        in_channels=channels,
        feat_channels=channels,
        # Half the usual size, because images are small.
        anchor_generator=dict(scales=[4], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=channels, finest_scale=28),
        bbox_head=dict(
            in_channels=channels, fc_out_channels=256, num_classes=len(metainfo['classes']))),
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=500, max_per_img=300),
        rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=300)))

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
# Reading such images takes so little time that processes for it do not pay.
loader = dict(num_workers=0, persistent_workers=False)
dataset = dict(data_root=data_root, metainfo=metainfo)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(pipeline=train_pipeline, filter_cfg=dict(min_size=0), **train_files, **dataset),
    **loader)
val_dataloader = dict(
    batch_size=4, dataset=dict(pipeline=test_pipeline, **val_files, **dataset), **loader)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + val_files['ann_file'])
test_evaluator = val_evaluator

max_epochs = 8
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0., bias_decay_mult=0.),
    clip_grad=dict(max_norm=10))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, end=50),
    # The end as a part of the rate, so that it is one for parameters with any rate.
    dict(type='CosineAnnealingLR', by_epoch=True, T_max=max_epochs, convert_to_iter_based=True,
         eta_min_ratio=0.02),
]
randomness = dict(seed=0)
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(max_keep_ckpts=2))
