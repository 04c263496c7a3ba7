# For the configs of MMSegmentation that have a ResNetV1c, whose strides, dilations and norms stay;
# set as the backbone with model = dict(pretrained=None, backbone=_base_.kw_backbone).
kw_backbone = dict(
    type='KWResNet',
    deep_stem=True,
    drop_path_rate=0.1,
    # Two to four images on a GPU: too few for the attention's batch norm, which trains here.
    kw_cfg=dict(cell_num_ratio=1, attn_norm='LN'),
    init_cfg=dict(type='StaticPretrained', checkpoint='open-mmlab://resnet50_v1c'))
