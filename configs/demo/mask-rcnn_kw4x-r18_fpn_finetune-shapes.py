_base_ = 'mask-rcnn_r18_fpn_finetune-shapes.py'

model = dict(backbone=dict(static=False, kw_cfg=dict(cell_num_ratio=4, attn_norm='LN')))
