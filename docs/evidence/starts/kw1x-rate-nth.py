# The same, at the rate divided by the number of cells.
_base_ = '../../../configs/small_data/faster-rcnn_kw1x-mobilenet-v2_fpn_1xb4-8e_320x240.py'

custom_imports = dict(imports=['kw_mm', 'tried_starts'], allow_failed_imports=False)
model = dict(backbone=dict(init_cfg=dict(type='TriedStart')))
optim_wrapper = dict(constructor='TriedConstructor', paramwise_cfg=dict(divisor=None))
