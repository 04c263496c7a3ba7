# The static baseline: MMDetection's own MobileNetV2, which counts stages differently from
# KWMobileNetV2; frozen and returned are the same layers.
_base_ = 'mask-rcnn_r50_fpn_ms-adamw-1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='MobileNetV2',
        out_indices=(1, 2, 4, 7),
        frozen_stages=2,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint='open-mmlab://mmdet/mobilenet_v2')),
    neck=dict(in_channels=[24, 32, 96, 1280]))
