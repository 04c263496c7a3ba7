# The static baseline of the paper's COCO table.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-1x.py',
    '../_base_/runtime.py',
]

# What torchvision://resnet50 stands for, without torchvision.
model = dict(backbone=dict(init_cfg=dict(
    checkpoint='https://download.pytorch.org/models/resnet50-0676ba61.pth')))
