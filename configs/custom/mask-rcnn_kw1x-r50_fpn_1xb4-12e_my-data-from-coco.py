# Your own data set, from a static detector that was trained on COCO: the same as the config below,
# but for what the training starts from. docs/custom_dataset.md has the command that makes the file.
_base_ = 'mask-rcnn_kw1x-r50_fpn_1xb4-12e_my-data.py'

load_from = 'checkpoints/mask-rcnn_kw1x-r50_from-coco.pth'
# The file has the backbone too.
model = dict(backbone=dict(init_cfg=None))
