# The static baseline of the paper's COCO table.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-1x.py',
    '../_base_/runtime.py',
]
