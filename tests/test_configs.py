"""Tests of every config."""
import re

import pytest
import torch
from config_files import CONFIGS, DET_CONFIGS, SEG_CONFIGS, by_model, read_config

from kw_mm import KWConv2d


def test_there_are_configs_of_both_toolboxes():
    assert 'mask_rcnn/mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py' in DET_CONFIGS
    assert 'upernet/upernet_kw1x-r50_4xb4-160k_ade20k-512x512.py' in SEG_CONFIGS
    assert len(DET_CONFIGS) + len(SEG_CONFIGS) == len(CONFIGS)


@pytest.mark.parametrize('scope, names', [('mmdet', DET_CONFIGS), ('mmseg', SEG_CONFIGS)])
def test_all_are_read_and_import_the_package(scope, names):
    for name in names:
        cfg = read_config(name)
        assert cfg.default_scope == scope, name
        assert cfg.custom_imports.imports == ['kw_mm'], name
        assert ('kw_cfg' in str(cfg.model.backbone) and cfg.model.backbone.kw_cfg is not None) == (
            '_kw' in name), name


def test_one_of_them_stands_for_all_that_differ_in_length():
    # The tests with a training step take one of each list.
    for first, *others in by_model(CONFIGS):
        for name in others:
            cfg, same = read_config(name), read_config(first)
            assert (cfg.model, cfg.optim_wrapper) == (same.model, same.optim_wrapper), name


@pytest.mark.parametrize('name, ratio', [('kw1d2x', 0.5), ('kw1x', 1), ('kw4x', 4)])
def test_names_tell_the_budget(name, ratio):
    budgets = [read_config(n).model.backbone.kw_cfg.cell_num_ratio
               for n in CONFIGS if re.search(rf'_{name}-', n)]
    assert budgets
    assert all(min(b) == ratio if isinstance(b, (list, tuple)) else b == ratio for b in budgets)


def test_mixed_precision_keeps_the_state_in_single():
    model = torch.nn.Sequential(KWConv2d(8, 8, 3), torch.nn.Flatten(), torch.nn.LazyLinear(2))
    with torch.autocast('cpu', torch.bfloat16):
        out = model(torch.randn(2, 8, 5, 5))
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert {p.grad.dtype for p in model[0].parameters()} == {torch.float32}


@pytest.mark.parametrize('name', [n for n in CONFIGS if n.startswith('demo/')])
def test_a_demo_that_is_interrupted_loses_an_epoch_at_most(name):
    # The segmentor's had no interval, so it was only saved at the end, and a killed run started
    # again.
    hook = read_config(name).default_hooks.checkpoint
    assert hook.type == 'CheckpointHook' and hook.interval == 1 and hook.get('by_epoch', True)
