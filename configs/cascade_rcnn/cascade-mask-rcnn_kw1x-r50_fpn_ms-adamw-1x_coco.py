_base_ = [
    'mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-1x.py',
    '../_base_/runtime.py',
]

model = dict(
    backbone=dict(
        type='KWResNet',
        drop_path_rate=0.1,
        kw_cfg=dict(cell_num_ratio=1),
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://resnet50')))
