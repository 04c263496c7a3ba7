_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-1x.py',
    '../_base_/runtime.py',
    '../_base_/backbones/kw1x-r50.py',
]

model = dict(backbone=_base_.kw_backbone)
