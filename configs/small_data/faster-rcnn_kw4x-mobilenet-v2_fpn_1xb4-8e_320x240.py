_base_ = 'faster-rcnn_kw1x-mobilenet-v2_fpn_1xb4-8e_320x240.py'

model = dict(backbone=dict(share_pointwise=False, kw_cfg=dict(cell_num_ratio=4)))
