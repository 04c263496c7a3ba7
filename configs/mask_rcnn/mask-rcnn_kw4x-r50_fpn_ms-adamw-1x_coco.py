_base_ = 'mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py'

model = dict(backbone=dict(kw_cfg=dict(cell_num_ratio=4)))
