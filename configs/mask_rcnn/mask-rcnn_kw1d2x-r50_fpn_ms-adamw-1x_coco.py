# The ImageNet model of this budget has been published, a detector has not.
_base_ = 'mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py'

model = dict(
    backbone=dict(
        kw_cfg=dict(
            cell_num_ratio=0.5,
            cell_inplane_ratio=0.5,
            cell_outplane_ratio=0.5,
            nonlocal_basis_ratio=1 / 16)))
