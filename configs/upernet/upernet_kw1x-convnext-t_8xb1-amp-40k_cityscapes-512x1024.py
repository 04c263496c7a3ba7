_base_ = 'upernet_convnext-t_8xb1-amp-40k_cityscapes-512x1024.py'

model = dict(backbone=dict(static=False, kw_cfg=dict(cell_num_ratio=1)))
