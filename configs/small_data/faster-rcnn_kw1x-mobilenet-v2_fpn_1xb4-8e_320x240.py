_base_ = 'faster-rcnn_mobilenet-v2_fpn_1xb4-8e_320x240.py'

# Four images a step: too few for the attention's batch norm.
model = dict(backbone=dict(static=False, kw_cfg=dict(cell_num_ratio=1, attn_norm='LN')))
custom_hooks = [dict(type='RandomStateHook'), dict(type='KWMixingHook', interval=50)]
