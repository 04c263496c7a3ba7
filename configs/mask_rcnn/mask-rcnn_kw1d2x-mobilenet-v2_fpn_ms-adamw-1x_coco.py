# The ImageNet model of this budget has been published, a detector has not. Its entries are, in
# order: the stem, the depthwise layers of stages 1 to 5, and of stage 6 the expanding, depthwise
# and projecting ones.
_base_ = 'mask-rcnn_kw1x-mobilenet-v2_fpn_ms-adamw-1x_coco.py'

ratios = (1, 1, 1, 1, 1, 1, 0.5, 1, 0.5)
model = dict(
    backbone=dict(
        share_pointwise=False,
        static_pointwise_stages=(1, 2, 3, 4, 5),
        kw_cfg=dict(
            cell_num_ratio=ratios,
            cell_inplane_ratio=ratios,
            cell_outplane_ratio=ratios,
            reduction=1 / 32)))
