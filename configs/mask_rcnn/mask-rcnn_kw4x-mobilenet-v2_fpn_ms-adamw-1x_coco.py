_base_ = 'mask-rcnn_kw1x-mobilenet-v2_fpn_ms-adamw-1x_coco.py'

model = dict(backbone=dict(share_pointwise=False, kw_cfg=dict(cell_num_ratio=4)))
