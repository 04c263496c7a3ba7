# In bfloat16, which needs no loss scaling; float16 (dtype=None) works on cards without it.
_base_ = 'mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py'

optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16')
