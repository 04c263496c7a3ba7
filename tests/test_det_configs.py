"""Every detector is built, takes a training step and predicts, with small images and few boxes."""
import re

import pytest
import torch
from config_files import DET_CONFIGS, by_model, read_config
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from mmengine.registry import DefaultScope

from kw_mm import KWConvNeXt, KWResNet
from kw_mm.config_types import all_dicts, without_downloads_

PAPER = [name for name in DET_CONFIGS if name.startswith('mask_rcnn') and '_ms-adamw-1x_' in name]


# The numbers of boxes that a detector uses. They do not change the size of layers.
FEW = dict(nms_pre=200, max_per_img=100, num_queries=100, num_dn_queries=20)


def with_few_boxes(model):
    """A model's config with a tenth of the proposals, samples and queries."""
    for _, node in all_dicts(model):
        node.update({name: few for name, few in FEW.items() if node.get(name, 0) > few})
        if node.get('type') == 'RandomSampler':
            node.num = min(node.num, 64)
    return model


def test_the_paper_s_table_is_whole():
    assert len(PAPER) == 10


@pytest.mark.slow
@pytest.mark.parametrize('name', [names[0] for names in by_model(DET_CONFIGS)])
def test_a_training_step_and_a_prediction(name, monkeypatch):
    # The only check that forbids mmengine's mixed precision on CPUs, where bfloat16 works too.
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    torch.manual_seed(0)
    cfg = read_config(name)
    num_classes = {d['num_classes'] for _, d in all_dicts(cfg.model) if 'num_classes' in d}.pop()
    with_mask = any(re.search('Mask|RTMDetIns', d.get('type', ''))
                    for _, d in all_dicts(cfg.model) if isinstance(d.get('type', ''), str))
    if 'rtmdet' in name:  # its pipeline returns squares of one size
        sizes = [[3, 128, 128]] * 2
    elif '_amp-' in name:  # larger ones take minutes on CPUs without bfloat16 instructions
        sizes = [[3, 64, 32], [3, 32, 64]]
    else:
        sizes = [[3, 128, 96], [3, 96, 128]]
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = revert_sync_batchnorm(MODELS.build(with_few_boxes(without_downloads_(cfg.model))))
        model.init_weights()
        for module in model.modules():
            # DINO freezes norms. With initial zeros they would stop the gradients of a branch.
            if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
                torch.nn.init.ones_(module.weight)
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        batch = demo_mm_inputs(2, sizes, num_classes=num_classes, with_mask=with_mask)
        for sample in batch['data_samples']:
            sample.set_metainfo(dict(scale_factor=(1.0, 1.0)))
        inputs = model.data_preprocessor(batch, training=True)
        model.train()
        with wrapper.optim_context(model):
            loss, _ = model.parse_losses(model(**inputs, mode='loss'))
        wrapper.backward(loss)
        assert torch.isfinite(loss)
        # Distributed training without find_unused_parameters needs a gradient for each.
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert unused == []
        cells = [p for n, p in model.named_parameters()
                 if 'warehouse_manager' in n and p.requires_grad]
        before = [tensor.detach().clone() for tensor in cells]
        wrapper.step()
        assert not any(torch.equal(*pair) for pair in zip(before, cells))
        model.eval()
        with torch.no_grad():
            samples = model.test_step(batch)
    assert bool(cells) == ('_kw' in name)
    for sample in samples:
        found = sample.pred_instances
        assert len(found) == 0 or 0 <= found.labels.min() <= found.labels.max() < num_classes
        if with_mask:
            assert tuple(found.masks.shape[1:]) == tuple(sample.ori_shape)


@pytest.mark.parametrize('name', PAPER)
def test_the_paper_s_recipe(name):
    cfg = read_config(name)
    convnext = 'convnext' in name
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999),
                                               weight_decay=0.05)
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end, steps.milestones) == (
        0.001, 500, [9, 11] if convnext else [8, 11])
    backbone = cfg.model.backbone
    if convnext:
        assert (backbone.drop_path_rate, backbone.layer_scale_init_value) == (0.4, 1)
        assert backbone.get('frozen_stages', -1) == -1
        assert cfg.optim_wrapper.constructor == 'LearningRateDecayOptimizerConstructor'
        assert cfg.optim_wrapper.paramwise_cfg == dict(
            decay_rate=0.95, decay_type='layer_wise', num_layers=6)
    else:
        assert backbone.frozen_stages == (2 if backbone.type == 'MobileNetV2' else 1)
        assert backbone.norm_eval
        rate = 0.1 if backbone.type == 'KWResNet' else 0
        assert backbone.get('drop_path_rate', 0) == rate
        assert cfg.optim_wrapper.paramwise_cfg == dict(
            custom_keys=dict(norm=dict(decay_mult=0)))
    flip, choice = cfg.train_dataloader.dataset.pipeline[2:4]
    assert flip == dict(type='RandomFlip', prob=0.5)
    (resize,), (first, crop, second) = choice.transforms
    assert resize.scales == second.scales == [(s, 1333) for s in range(480, 801, 32)]
    assert [short for short, _ in first.scales] == [400, 500, 600]
    assert (crop.crop_type, crop.crop_size, crop.allow_negative_crop) == (
        'absolute_range', (384, 600), True)


def test_three_times_as_long():
    for name in DET_CONFIGS:
        if '-adamw-3x_' in name:
            cfg = read_config(name)
            once = read_config(name.replace('-3x_', '-1x_'))
            assert cfg.train_cfg.max_epochs == 36
            assert cfg.param_scheduler[1].milestones == [27, 33]
            assert cfg.model == once.model
            assert cfg.optim_wrapper == once.optim_wrapper


def build_wrapper(name, backbone):
    cfg = read_config(f'mask_rcnn/mask-rcnn_{name}_fpn_ms-adamw-1x_coco.py')
    model = torch.nn.ModuleDict(dict(backbone=backbone, head=torch.nn.Linear(2, 2)))
    with DefaultScope.overwrite_default_scope('mmdet'):
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(p): n for n, p in model.named_parameters()}
    return {names[id(p)]: group for group in wrapper.optimizer.param_groups
            for p in group['params']}


def test_decay_spares_the_attention_norms_alone():
    groups = build_wrapper('kw1x-r50', KWResNet(18, base_channels=4))
    spared = {name for name, group in groups.items() if group['weight_decay'] == 0}
    assert spared == {name for name in groups if 'attention.norm1' in name}


def test_layerwise_rates_of_the_convnext_recipe():
    backbone = KWConvNeXt(dict(depths=(3, 3, 9, 3), channels=(8, 8, 8, 8)))
    groups = build_wrapper('kw1x-convnext-t', backbone)
    assert set(groups) == {n for n, _ in torch.nn.ModuleDict(
        dict(backbone=backbone, head=torch.nn.Linear(2, 2))).named_parameters()}

    def power(name):
        """The power of 0.95 in the learning rate."""
        return round(torch.log(torch.tensor(groups[name]['lr'] / 1e-4)).item() / -0.0512933)

    # 6 layers and the heads; those at the input have the highest power.
    expected = {
        'backbone.warehouse_manager.weights.0': 0, 'backbone.warehouse_manager.weights.11': 0,
        'backbone.norm0.weight': 0, 'head.weight': 0,
        'backbone.downsample_layers.0.0.attention.fc1.weight': 7,
        'backbone.stages.0.0.gamma': 6, 'backbone.stages.1.2.pwconv1.attention.fc2.weight': 5,
        'backbone.stages.2.0.dwconv.bias': 4, 'backbone.stages.2.3.dwconv.bias': 3,
        'backbone.stages.2.8.dwconv.bias': 2, 'backbone.stages.3.0.pwconv2.bias': 1,
        'backbone.downsample_layers.3.1.bias': 1}
    assert {name: power(name) for name in expected} == expected
    for name, parameter in backbone.named_parameters():
        decays = parameter.dim() > 1
        assert (groups[f'backbone.{name}']['weight_decay'] == 0.05) == decays, name
