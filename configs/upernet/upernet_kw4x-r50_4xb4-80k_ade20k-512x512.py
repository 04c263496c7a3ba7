_base_ = 'upernet_kw1x-r50_4xb4-80k_ade20k-512x512.py'

model = dict(backbone=dict(kw_cfg=dict(cell_num_ratio=4)))
