_base_ = [
    'fpn_r50_4xb2-40k_cityscapes-512x1024.py',
    '../_base_/backbones/kw1x-r50-v1c.py',
]

model = dict(pretrained=None, backbone=_base_.kw_backbone)
