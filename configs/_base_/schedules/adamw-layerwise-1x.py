# The paper's recipe for ConvNeXt-T: learning rates decay towards the input by 0.95 for each of 6
# layers, warehouse cells have the undecayed rate; no decay of 1-d parameters and biases; steps at
# 9 and 11.
_base_ = 'adamw-1x.py'

optim_wrapper = dict(
    constructor='LearningRateDecayOptimizerConstructor',
    paramwise_cfg=dict(_delete_=True, decay_rate=0.95, decay_type='layer_wise', num_layers=6))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[9, 11], gamma=0.1),
]
