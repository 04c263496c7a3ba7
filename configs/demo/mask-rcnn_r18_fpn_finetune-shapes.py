# The static twin, trained in the same way.
_base_ = 'mask-rcnn_kw1x-r18_fpn_finetune-shapes.py'

model = dict(backbone=dict(static=True, kw_cfg=None))
