"""KWMixingHook in a real Runner, on a network of one KW layer."""
import itertools
import json
from pathlib import Path

import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader
from toy_training import make_fast

from kw_mm import KWConv2d, KWMixingHook

NAMES = (f'mixing{i}' for i in itertools.count())
ITERS = 4


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    make_fast(monkeypatch)


class Net(BaseModel):
    def __init__(self, dynamic=True):
        super().__init__()
        conv = nn.Conv2d(2, 4, 3, padding=1)
        self.conv = KWConv2d.from_conv(conv, dict(cell_num_ratio=4)) if dynamic else conv

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return dict(loss=self.conv(inputs).square().mean())


def runner(work_dir, hook, model, epochs=2):
    data = [dict(inputs=torch.randn(2, 4, 4)) for _ in range(2 * ITERS)]
    return Runner(
        model, str(work_dir), DataLoader(data, 2, sampler=DefaultSampler(data, seed=0)),
        train_cfg=dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='Adam', lr=0.001)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)), custom_hooks=[hook],
        randomness=dict(seed=0), experiment_name=next(NAMES))


def logged(run):
    lines = Path(run.log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    return [(line['step'], line['start_part'], line['start_part_min'], line['variation'],
             line['variation_max']) for line in map(json.loads, lines) if 'start_part' in line]


def test_what_is_logged(tmp_path):
    run = runner(tmp_path, dict(type='KWMixingHook', interval=ITERS), Net())
    run.train()
    steps, parts, least, variations, most = zip(*logged(run))
    # From the first record on, each line has the last one.
    assert steps == tuple(range(ITERS, 2 * ITERS + 1))
    assert parts == least and variations == most  # one layer
    assert 1 > parts[0] == parts[-2] > parts[-1] > 0.8
    assert 0 <= variations[-1] < 0.1
    assert not run.model.conv.attention._forward_hooks


@pytest.mark.parametrize('interval', [0, -1, True, 1.5])
def test_the_interval_is_checked(interval):
    with pytest.raises(ValueError, match='interval must be a positive integer'):
        KWMixingHook(interval)


def test_a_static_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match='KWMixingHook found no KW layer'):
        runner(tmp_path, KWMixingHook(), Net(dynamic=False)).train()
