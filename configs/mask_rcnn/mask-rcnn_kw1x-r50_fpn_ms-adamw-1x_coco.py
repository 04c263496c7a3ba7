_base_ = [
    'mask-rcnn_r50_fpn_ms-adamw-1x_coco.py',
    '../_base_/backbones/kw1x-r50.py',
]

# Starts from torchvision's static weights. The paper's figures are from KW weights, converted with
# tools/model_converters/official2kw.py:
# init_cfg=dict(type='Pretrained', checkpoint='...', prefix='backbone.').
model = dict(backbone=_base_.kw_backbone)
