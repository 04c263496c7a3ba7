_base_ = 'upernet_kw1x-r50_4xb2-40k_cityscapes-512x1024.py'

model = dict(backbone=dict(kw_cfg=dict(cell_num_ratio=4)))
