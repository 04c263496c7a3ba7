_base_ = 'mask-rcnn_r50_fpn_ms-adamw-1x_coco.py'

# Starts from torchvision's static weights. The paper's figures are from KW weights, converted with
# tools/model_converters/official2kw.py:
# init_cfg=dict(type='Pretrained', checkpoint='...', prefix='backbone.').
model = dict(
    backbone=dict(
        type='KWResNet',
        drop_path_rate=0.1,
        kw_cfg=dict(cell_num_ratio=1),
        init_cfg=dict(type='StaticPretrained', checkpoint='torchvision://resnet50')))
