_base_ = ['mask-rcnn_convnext-t_fpn_ms-adamw-1x_coco.py', '../_base_/schedules/3x.py']

train_cfg = _base_.schedule_3x.train_cfg
param_scheduler = _base_.schedule_3x.param_scheduler
