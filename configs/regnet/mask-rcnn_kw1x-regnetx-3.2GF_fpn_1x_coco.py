# A RegNet and its FPN, both dynamic by conversion.
_base_ = ['mmdet::regnet/mask-rcnn_regnetx-3.2GF_fpn_1x_coco.py', '../_base_/plugin.py']

kw_cfg = dict(cell_num_ratio=1, attn_norm='LN')
model = dict(
    backbone=dict(
        _delete_=True, type='KWConverted', module={{_base_.model.backbone}}, kw_cfg=kw_cfg),
    neck=dict(_delete_=True, type='KWConverted', module={{_base_.model.neck}}, kw_cfg=kw_cfg))
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True, type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={'norm': dict(decay_mult=0.)}))
