_base_ = [
    'deeplabv3plus_mobilenet-v2-d8_4xb2-40k_cityscapes-512x1024.py',
    '../_base_/backbones/kw1x-mobilenet-v2-d8.py',
]

model = dict(pretrained=None, backbone=dict(_delete_=True, **_base_.kw_backbone))
