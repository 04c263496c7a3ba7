# RTMDet-Ins with the neck and head of its size l.
_base_ = 'mmdet::rtmdet/rtmdet-ins_l_8xb32-300e_coco.py'

custom_imports = dict(imports=['kw_mm'], allow_failed_imports=False)
model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type='KWResNet',
        depth=50,
        out_indices=(1, 2, 3),
        norm_cfg=dict(type='SyncBN'),
        norm_eval=False,
        drop_path_rate=0.1,
        kw_cfg=dict(cell_num_ratio=1),
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://resnet50')),
    neck=dict(in_channels=[512, 1024, 2048]))
