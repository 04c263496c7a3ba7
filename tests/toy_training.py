"""A training of milliseconds in which every part draws random numbers and records what it does."""
import contextlib
import itertools
import random
from types import SimpleNamespace

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

import kw_mm  # noqa: F401  (registers the hook)

NAMES = (f'random{i}' for i in itertools.count())
SAMPLES, BATCH, EPOCHS = 8, 2, 4
HOOK = dict(type='RandomStateHook')


def make_fast(monkeypatch):
    """Saves each Runner calls of compilers and git, and a pause."""
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)
    for module in ('runner.runner', 'hooks.runtime_info_hook'):
        monkeypatch.setattr(f'mmengine.{module}.get_git_hash', lambda: '')
    monkeypatch.setattr('mmengine.runner.loops.time', SimpleNamespace(sleep=lambda seconds: None))


class Noisy:
    """Samples with augmentation from all three generators that transforms use."""

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(())
        return dict(inputs=torch.arange(4.) + index + noise)


class Net(BaseModel):
    """Records its losses, and draws random numbers in evaluation too, like some heads."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(),
                                    nn.Linear(8, 1))
        self.losses = []

    def forward(self, inputs, data_samples=None, mode='tensor'):
        y = self.layers(torch.stack(inputs))
        if mode == 'loss':
            loss = y.square().mean()
            self.losses.append(loss.item())
            return dict(loss=loss)
        random.random(), np.random.rand(), torch.rand(3)
        return [y]


class Score(BaseMetric):
    """A score that improves with each epoch, so that ``save_best`` writes during validation."""

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        Score.value += 1
        return dict(score=Score.value)


class Kill(Hook):
    """Ends a run before one of its iterations."""

    def __init__(self, before_iter):
        self.before_iter = before_iter

    def before_train_iter(self, runner, *args, **kwargs):
        if runner.iter == self.before_iter:
            raise KeyboardInterrupt


def run(work_dir, *hooks, by_epoch=True, validate=True, workers=0, seed=0, sampler=DefaultSampler,
        epochs=EPOCHS, save_best=None, keep=-1, checkpoint=None, **kwargs):
    """Trains and returns the losses by iteration, up to the end or a kill."""
    Score.value = 0
    total = epochs * SAMPLES // BATCH
    train_cfg = (dict(by_epoch=True, max_epochs=epochs, val_interval=1) if by_epoch
                 else dict(by_epoch=False, max_iters=total, val_interval=3))

    def loader(sampler):
        return dict(dataset=Noisy(), batch_size=BATCH, num_workers=workers,
                    sampler=dict(type=sampler, shuffle=True))

    if validate:
        kwargs.update(val_dataloader=loader(DefaultSampler), val_cfg=dict(),
                      val_evaluator=[Score()])
    runner = Runner(
        dict(type=Net), str(work_dir), train_dataloader=loader(sampler), train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=dict(type='LinearLR', start_factor=0.1, end=total, by_epoch=False),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), checkpoint=dict(
            type='CheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 5,
            max_keep_ckpts=keep, save_best=save_best,
            rule='greater' if save_best else None, **(checkpoint or {}))),
        custom_hooks=list(hooks), log_processor=dict(by_epoch=by_epoch),
        randomness=dict(seed=seed), experiment_name=next(NAMES), **kwargs)
    with contextlib.suppress(KeyboardInterrupt):
        runner.train()
    first = runner.iter - len(runner.model.losses)
    return dict(enumerate(runner.model.losses, first))
