"""Whole detectors trained for some steps with the project's own tool, on generated images."""
from __future__ import annotations

import math
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config

from kw_mm.config_types import innermost_dataset
from kw_mm.datasets import write_shapes
from kw_mm.engine.scalars import read_scalars

from .detectors import read_config
from .schedule import Findings

TOOLS = Path(__file__).parents[2]
KW, STATIC = 'mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco', 'mask-rcnn_r50_fpn_ms-adamw-1x_coco'
# Not counted: libraries choose their kernels, and memory comes from the system.
WARMUP_STEPS = 5


def run(device: str, out: Path, configs: Path, findings: Findings,
        attempt: Callable[..., Any]) -> None:
    """Trains a KW detector and its static twin, resumes the one, and runs it under torchrun.

    Args:
        device: ``'cuda'``, or ``'cpu'`` for two steps of small images.
        out: A folder for data, configs and checkpoints.
        configs: Where the project's are.
        findings: Gets a row for each run.
        attempt: Runs a function and goes on if it fails.
    """
    on_cuda = torch.device(device).type == 'cuda'
    steps = 30 if on_cuda else 2
    data = write_shapes(out / 'data', *((64, 8, 512) if on_cuda else (4, 1, 64))).root
    files = {}
    for name in (KW, STATIC):
        files[name] = out / f'{name}.py'
        make_config(configs / f'{name}.py', Path(data), steps, on_cuda).dump(files[name])

    def train(name: str, title: str, *options: str, launcher: tuple[str, ...] = ()) -> None:
        folder = out / title.replace(' ', '_')
        command = [sys.executable, *launcher, str(TOOLS / 'train.py'), str(files[name]),
                   '--work-dir', str(folder), '--skip-data-check', *options]
        with (out / f'{folder.name}.log').open('w') as log:
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            lines = (out / f'{folder.name}.log').read_text().splitlines()
            raise RuntimeError('\n'.join(lines[-6:]))
        findings.add('training', run=title, **summarise(read_scalars(folder)))

    attempt('KW', train, KW, 'KW')
    attempt('static', train, STATIC, 'static')
    attempt('resumed', train, KW, 'KW resumed', '--resume',
            str(out / 'KW' / f'iter_{steps // 2}.pth'))
    attempt('torchrun', lambda: train(
        KW, 'KW with torchrun', '--launcher', 'pytorch', '--cfg-options',
        f'train_cfg.max_iters={2 if on_cuda else 1}',
        launcher=('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '1')))


def make_config(path: Path, data: Path, steps: int, on_cuda: bool) -> Config:
    """A config of the project for some steps on generated images, with a moving average and
    clipped gradients; in mixed precision on a GPU."""
    cfg = read_config(str(path))
    dataset = innermost_dataset(cfg.train_dataloader.dataset)
    dataset.update(data_root=f'{data}/', ann_file='annotations/instances_train.json',
                   data_prefix=dict(img='train/'),
                   metainfo=dict(classes=('circle', 'square', 'triangle', 'ring')))
    cfg.train_dataloader.update(batch_size=2, num_workers=4 if on_cuda else 0,
                                persistent_workers=on_cuda)
    if not on_cuda:
        # As they are: the paper's are resized to 800 pixels.
        dataset.pipeline = [dict(type='LoadImageFromFile'),
                            dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                            dict(type='PackDetInputs')]
        # Few proposals, for heads of this size take a CPU seconds.
        cfg.model.train_cfg.rpn_proposal.update(nms_pre=50, max_per_img=20)
        cfg.model.train_cfg.rcnn.sampler.num = 8
    cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=steps, val_interval=10**6)
    cfg.param_scheduler = []
    for name in ('dataloader', 'evaluator', 'cfg'):
        cfg[f'val_{name}'] = cfg[f'test_{name}'] = None
    cfg.default_hooks.logger.interval = 1
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=False,
                                        interval=steps // 2, max_keep_ckpts=2)
    cfg.custom_hooks = [dict(type='EMAHook')]
    cfg.log_processor = dict(type='LogProcessor', window_size=1, by_epoch=False)
    cfg.optim_wrapper.clip_grad = dict(max_norm=35)
    if on_cuda:
        cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16')
    return cfg


def summarise(steps: list[dict[str, float]]) -> dict[str, Any]:
    """A row: steps, seconds a step, peak memory, losses.

    Raises:
        RuntimeError: If a loss is not finite.
    """
    losses = [step['loss'] for step in steps]
    if not losses or not all(map(math.isfinite, losses)):
        raise RuntimeError(f'losses must be finite, got {losses}')
    times = [step['time'] for step in steps]
    row: dict[str, Any] = dict(steps=len(steps), from_step=steps[0]['iter'],
                               seconds_a_step=statistics.median(times[WARMUP_STEPS:] or times))
    if 'memory' in steps[-1]:
        row['peak_MiB'] = steps[-1]['memory']
    return dict(row, first_loss=losses[0], last_loss=losses[-1])
