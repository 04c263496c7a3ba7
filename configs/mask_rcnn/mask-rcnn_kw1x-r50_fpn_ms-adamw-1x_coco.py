_base_ = 'mask-rcnn_r50_fpn_ms-adamw-1x_coco.py'

# The recipe fine-tunes a pretrained backbone (stem and first stage are frozen). Its weights go
# here: init_cfg=dict(type='Pretrained', checkpoint='...', prefix='backbone.').
model = dict(
    backbone=dict(
        type='KWResNet',
        drop_path_rate=0.1,
        kw_cfg=dict(cell_num_ratio=1),
        init_cfg=None))
