# COCO detection with the paper's augmentation.
_base_ = ['mmdet::_base_/datasets/coco_detection.py', '../augmentation/ms-crop.py']

train_pipeline = [
    dict(type='LoadImageFromFile', backend_args={{_base_.backend_args}}),
    dict(type='LoadAnnotations', with_bbox=True),
    {{_base_.flip}},
    {{_base_.resize_or_crop}},
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
