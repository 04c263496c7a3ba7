"""KWTemperatureHook in a real Runner, on a network of one KW layer."""
import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import DataLoader

from kw_mm import KWConv2d, KWTemperatureHook
from kw_mm.engine.hooks.temperature import _iters_per_epoch

NAMES = (f'temperature{i}' for i in itertools.count())
SAMPLES, BATCH = 8, 2
ITERS = SAMPLES // BATCH


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Saves each Runner calls of compilers and git, a pause, and threads for tiny tensors."""
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    for module in ('runner.runner', 'hooks.runtime_info_hook'):
        monkeypatch.setattr(f'mmengine.{module}.get_git_hash', lambda: '')
    monkeypatch.setattr('mmengine.runner.loops.time', SimpleNamespace(sleep=lambda seconds: None))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Net(BaseModel):
    """Notes the temperature that each training and validation step sees."""

    def __init__(self, dynamic=True):
        super().__init__()
        self.conv = (KWConv2d if dynamic else nn.Conv2d)(2, 4, 3, padding=1)
        self.trained_at = []
        self.tested_at = []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        y = self.conv(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        tau = getattr(self.conv, 'attention', None) and self.conv.attention.tau.item()
        if mode == 'loss':
            self.trained_at.append(tau)
            return dict(loss=y.square().mean())
        self.tested_at.append(tau)
        return [y]


class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(count=len(results))


class ValidateFirst(Hook):
    """Validates before the first training iteration, resumed or not."""

    def before_train_epoch(self, runner):
        if not runner.model.trained_at:
            runner.val_loop.run()


def loader(sampler=DefaultSampler):
    data = [dict(inputs=torch.full((2, 4, 4), float(i))) for i in range(SAMPLES)]
    return DataLoader(data, BATCH, sampler=sampler(data, seed=0))


def runner(work_dir, hook, *hooks, model=None, epochs=3, train_cfg=None, sampler=DefaultSampler,
           accumulate=1, by_epoch=True, **kwargs):
    return Runner(
        model or Net(), str(work_dir), train_dataloader=loader(sampler),
        train_cfg=train_cfg or dict(by_epoch=True, max_epochs=epochs),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01), accumulative_counts=accumulate),
        val_dataloader=loader(), val_cfg=dict(), val_evaluator=[Count()],
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1),
                           checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch, interval=1)),
        custom_hooks=[hook, *hooks], log_processor=dict(by_epoch=by_epoch),
        randomness=dict(seed=0), experiment_name=next(NAMES), **kwargs)


def logged(run):
    scalars = Path(run.log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    lines = [json.loads(line) for line in scalars]
    return [line['tau'] for line in lines if 'tau' in line]


def test_by_hand_over_two_epochs_of_four_iterations(tmp_path):
    run = runner(tmp_path, dict(type='KWTemperatureHook', epochs=2))
    run.train()
    expected = [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0, 0, 0, 0, 0]
    assert run.model.trained_at == expected
    # A validation during training sees the temperature with which its epoch ended.
    assert run.model.tested_at == [0.5] * ITERS + [0.0] * 2 * ITERS
    assert logged(run) == pytest.approx(expected)
    log = next(tmp_path.rglob('*.log')).read_text()
    assert 'tau: 0.8750' in log and 'tau: 0.0000' in log


def test_iters_start_and_end(tmp_path):
    run = runner(tmp_path, KWTemperatureHook(iters=3, start=0.8, end=0.2), epochs=1)
    run.train()
    assert run.model.trained_at == pytest.approx([0.6, 0.4, 0.2, 0.2])
    assert run.model.trained_at[2:] == [0.2, 0.2]  # the end is met exactly


def test_does_not_touch_the_model_after_the_schedule(tmp_path):
    class Raise(Hook):
        def after_train_iter(self, runner, *args, **kwargs):
            if runner.iter == 2:
                runner.model.conv.attention.tau.fill_(0.7)

    run = runner(tmp_path, KWTemperatureHook(iters=2), Raise(), epochs=1)
    run.train()
    assert run.model.trained_at == [0.5, 0, 0, 0.7]


@pytest.mark.parametrize('stop', [1, 2])
def test_resumed_run_goes_on_where_the_schedule_was(tmp_path, stop):
    class Stop(Hook):
        def before_train_epoch(self, runner):
            if runner.epoch == stop:
                raise KeyboardInterrupt

    expected = [11 / 12 - i / 12 for i in range(12)]
    with pytest.raises(KeyboardInterrupt):
        runner(tmp_path, KWTemperatureHook(epochs=3), Stop()).train()
    run = runner(tmp_path, KWTemperatureHook(epochs=3), ValidateFirst(), resume=True)
    run.train()
    assert run.model.trained_at == pytest.approx(expected[stop * ITERS:])
    assert run.model.tested_at[:ITERS] == pytest.approx([expected[stop * ITERS - 1]] * ITERS)


def test_validation_before_training_sees_the_start(tmp_path):
    run = runner(tmp_path, KWTemperatureHook(epochs=2), ValidateFirst(), epochs=1)
    run.train()
    assert run.model.tested_at[:ITERS] == [1.0] * ITERS


# With update_buffers mmengine swaps all buffers for a validation, but averages only those in the
# state dict. So without the hook the copy would be evaluated at 0.
@pytest.mark.parametrize('update_buffers', [False, True])
def test_ema_copy_is_evaluated_at_the_current_temperature(tmp_path, update_buffers):
    ema = dict(type='EMAHook', update_buffers=update_buffers)
    run = runner(tmp_path, KWTemperatureHook(epochs=2), ema, ValidateFirst(), epochs=1)
    run.train()
    assert run.model.tested_at == [1.0] * ITERS + [0.5] * ITERS
    run = runner(tmp_path, KWTemperatureHook(epochs=2), ema, ValidateFirst(), epochs=2, resume=True)
    run.train()
    assert run.model.trained_at == [3 / 8, 2 / 8, 1 / 8, 0]
    assert run.model.tested_at == [0.5] * ITERS + [0.0] * ITERS


def test_accumulated_steps_are_counted(tmp_path):
    run = runner(tmp_path, KWTemperatureHook(epochs=1), epochs=1, accumulate=2)
    run.train()
    assert run.model.trained_at == [0.75, 0.5, 0.25, 0]


# InfiniteSampler, usual in iteration-based loops, has the length of the data set.
@pytest.mark.parametrize('sampler', [DefaultSampler, InfiniteSampler])
def test_epochs_in_an_iteration_based_loop(tmp_path, sampler):
    cfg = dict(by_epoch=False, max_iters=4, val_interval=2)
    run = runner(tmp_path, KWTemperatureHook(epochs=1), train_cfg=cfg, sampler=sampler,
                 by_epoch=False)
    run.train()
    assert run.model.trained_at == [0.75, 0.5, 0.25, 0]
    assert run.model.tested_at == [0.5] * ITERS + [0.0] * ITERS
    run = runner(tmp_path, KWTemperatureHook(epochs=2), sampler=sampler, by_epoch=False,
                 train_cfg=dict(cfg, max_iters=6), resume=True)
    run.train()
    assert run.model.trained_at == [3 / 8, 2 / 8]


def test_an_infinite_sampler_of_several_processes():
    data = loader(InfiniteSampler)
    data.batch_sampler.sampler.world_size = 2
    assert (len(data), _iters_per_epoch(data)) == (4, 2)


def test_stand_alone_validation_runs_at_zero(tmp_path):
    run = runner(tmp_path, KWTemperatureHook(epochs=2))
    run.val()
    assert run.model.tested_at == [0.0] * ITERS


def test_training_that_ends_before_the_schedule_is_warned_of(tmp_path):
    runner(tmp_path, KWTemperatureHook(epochs=4), epochs=1).train()
    assert 'Training ends after 4 iterations at temperature 0.75' in next(
        tmp_path.rglob('*.log')).read_text()


def test_model_without_kw_layer(tmp_path):
    run = runner(tmp_path, KWTemperatureHook(epochs=2), model=Net(dynamic=False))
    with pytest.raises(ValueError, match="no KW layer in the model 'Net'"):
        run.train()


@pytest.mark.parametrize('kwargs, error, match', [
    (dict(), ValueError, 'exactly one of epochs and iters .* got epochs=None, iters=None'),
    (dict(epochs=1, iters=1), ValueError, 'exactly one of epochs and iters'),
    (dict(epochs=0), ValueError, 'epochs must be a positive integer, got 0'),
    (dict(iters=-3), ValueError, 'iters must be a positive integer, got -3'),
    (dict(iters=2.5), TypeError, 'iters must be a positive integer, got 2.5'),
    (dict(epochs='2'), TypeError, "epochs must be a positive integer, got '2'"),
    (dict(epochs=True), TypeError, 'epochs must be a positive integer, got True'),
    (dict(epochs=1, start=1.5), ValueError, r'start must be a number in \[0, 1\], got 1.5'),
    (dict(epochs=1, end=float('nan')), ValueError, r'end must be a number in \[0, 1\], got nan'),
    (dict(epochs=1, end=None), TypeError, r'end must be a number in \[0, 1\], got None'),
])
def test_wrong_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        KWTemperatureHook(**kwargs)
