_base_ = [
    'fpn_r50_4xb4-80k_ade20k-512x512.py',
    '../_base_/backbones/kw1x-r50-v1c.py',
]

model = dict(pretrained=None, backbone=_base_.kw_backbone)
