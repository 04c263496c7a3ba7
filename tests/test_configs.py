"""Every config builds its model, takes a training step and predicts, nothing reduced but images."""
from pathlib import Path

import pytest
import torch
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DefaultScope

from kw_mm import KWResNet

ROOT = Path(__file__).parents[1] / 'configs'
CONFIGS = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob('[!_]*/*.py'))


def test_there_are_configs():
    assert 'mask_rcnn/mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py' in CONFIGS


@pytest.mark.slow
@pytest.mark.parametrize('name', CONFIGS)
def test_a_training_step_and_a_prediction(name):
    torch.manual_seed(0)
    cfg = Config.fromfile(ROOT / name)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        num_classes = cfg.model.roi_head.bbox_head.num_classes
        batch = demo_mm_inputs(2, [[3, 128, 96], [3, 96, 128]], num_classes=num_classes,
                               with_mask=True)
        inputs = model.data_preprocessor(batch, training=True)
        loss, _ = model.parse_losses(model(**inputs, mode='loss'))
        loss.backward()
        assert torch.isfinite(loss)
        # Distributed training without find_unused_parameters needs a gradient for each.
        unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert unused == []
        cells = getattr(model.backbone, 'warehouse_manager', torch.nn.ModuleList())
        before = [tensor.detach().clone() for tensor in cells.parameters()]
        wrapper.step()
        assert not any(torch.equal(*pair) for pair in zip(before, cells.parameters()))
        model.eval()
        with torch.no_grad():
            samples = model.test_step(batch)
    for sample in samples:
        found = sample.pred_instances
        assert len(found) == 0 or 0 <= found.labels.min() <= found.labels.max() < num_classes
        assert tuple(found.masks.shape[1:]) == tuple(sample.ori_shape)


@pytest.mark.parametrize('name', [n for n in CONFIGS if n.startswith('mask_rcnn')])
def test_the_paper_s_recipe(name):
    cfg = Config.fromfile(ROOT / name)
    assert cfg.train_cfg.max_epochs == 12
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999),
                                               weight_decay=0.05)
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end, steps.milestones) == (0.001, 500, [8, 11])
    backbone = cfg.model.backbone
    assert backbone.frozen_stages == 1
    assert backbone.norm_eval
    assert backbone.get('drop_path_rate', 0) == (0.1 if '_kw' in name else 0)
    flip, choice = cfg.train_dataloader.dataset.pipeline[2:4]
    assert flip == dict(type='RandomFlip', prob=0.5)
    (resize,), (first, crop, second) = choice.transforms
    assert resize.scales == second.scales == [(s, 1333) for s in range(480, 801, 32)]
    assert [short for short, _ in first.scales] == [400, 500, 600]
    assert (crop.crop_type, crop.crop_size, crop.allow_negative_crop) == (
        'absolute_range', (384, 600), True)


def test_decay_spares_the_attention_norms_alone():
    cfg = Config.fromfile(ROOT / 'mask_rcnn/mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py')
    model = torch.nn.ModuleDict(dict(backbone=KWResNet(18, base_channels=4)))
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    names = {id(p): n for n, p in model.named_parameters()}
    spared = {names[id(p)] for group in wrapper.param_groups if group['weight_decay'] == 0
              for p in group['params']}
    assert spared == {n for n in names.values() if 'attention.norm1' in n}


@pytest.mark.parametrize('name, ratio', [('kw1d2x', 0.5), ('kw1x', 1), ('kw4x', 4)])
def test_names_tell_the_budget(name, ratio):
    configs = [Config.fromfile(ROOT / n) for n in CONFIGS if f'_{name}-' in n]
    assert configs
    assert all(c.model.backbone.kw_cfg.cell_num_ratio == ratio for c in configs)
