_base_ = 'mask-rcnn_mobilenet-v2_fpn_ms-adamw-1x_coco.py'

model = dict(
    backbone=dict(
        _delete_=True,
        type='KWMobileNetV2',
        frozen_stages=1,
        norm_eval=True,
        kw_cfg=dict(cell_num_ratio=1),
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://mobilenet_v2')))
