_base_ = 'upernet_convnext-t_8xb2-amp-80k_ade20k-512x512.py'

model = dict(backbone=dict(static=False, kw_cfg=dict(cell_num_ratio=1)))
