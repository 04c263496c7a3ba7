_base_ = 'mask-rcnn_kw1x-r18_fpn_finetune-shapes.py'

model = dict(backbone=dict(kw_cfg=dict(cell_num_ratio=4)))
