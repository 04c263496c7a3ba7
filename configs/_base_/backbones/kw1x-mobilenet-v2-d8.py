# What the configs of MMSegmentation have as mobilenet-v2-d8, whose outputs it counts 1, 2, 4, 6.
kw_backbone = dict(
    type='KWMobileNetV2',
    strides=(1, 2, 2, 1, 1, 1, 1),
    dilations=(1, 1, 1, 2, 2, 4, 4),
    last_layer=False,
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    # Two to four images on a GPU: too few for the attention's batch norm.
    kw_cfg=dict(cell_num_ratio=1, attn_norm='LN'),
    init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://mobilenet_v2'))
