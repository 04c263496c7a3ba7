_base_ = 'mask-rcnn_convnext-t_fpn_ms-adamw-1x_coco.py'

model = dict(backbone=dict(static=False, kw_cfg=dict(cell_num_ratio=1)))
