# The MLPs and patch merging layers of a Swin-T share warehouses, one for each stage.
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py', '../_base_/plugin.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='KWConverted',
        module={{_base_.model.backbone}},
        kw_cfg=dict(cell_num_ratio=1, attn_norm='LN'),
        linear=True))
