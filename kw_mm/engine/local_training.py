"""Trains on this machine, with as many processes as suit it."""
from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from ..checkpoint import check_checkpoint
from ..compat import has_accelerator
from ..resuming import find_whole_checkpoint

# On CPUs many tensors are so small that two processes with one thread each train faster than one
# with two.
MAX_PROCESSES = 2
# One thread per process. And glibc keeps freed memory, because mapping and unmapping the memory of
# kernels takes a fifth of an iteration's time on a CPU.
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_MAX_': '0',
               'MALLOC_TRIM_THRESHOLD_': str(2**33), 'MALLOC_TOP_PAD_': str(2**27)}


def find_trained(work_dir: str, epochs: int) -> str | None:
    """The newest whole checkpoint of a folder, if a training of so many epochs is finished.

    Raises:
        ValueError: If there are checkpoints, none can be used, and not all of them are torn.
    """
    found = find_whole_checkpoint(work_dir).path
    if found is None:
        return None
    checkpoint: Any = check_checkpoint(found)
    return found if checkpoint['meta']['epoch'] >= epochs else None


def train_locally(tool: Path, config: str, work_dir: str, changes: Mapping[str, Any]) -> str:
    """Trains to the end, starting where an earlier call stopped.

    Args:
        tool: Path of ``tools/train.py``.
        config: Path of the config. Its batch size is that of all processes together.
        work_dir: Where to write, and to resume from if there is something to resume.
        changes: Settings that replace those of the config, by dotted names.

    Returns:
        The newest whole checkpoint.

    Raises:
        subprocess.CalledProcessError: If the training fails.
    """
    num_processes = 1 if has_accelerator() else min(MAX_PROCESSES, os.cpu_count() or 1)
    batch_size = Config.fromfile(config).train_dataloader.batch_size // num_processes
    changes = {**changes, 'train_dataloader.batch_size': batch_size}
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone',
         f'--nproc_per_node={num_processes}', tool, config, '--launcher', 'pytorch',
         '--work-dir', work_dir, '--resume', '--cfg-options',
         *(f'{name}={value}' for name, value in changes.items())],
        check=True, env={**ENVIRONMENT, **os.environ})
    found = find_whole_checkpoint(work_dir).path
    assert found is not None, 'training has ended, and ends with a checkpoint'
    return found


def use_shapes(folder: str, config: str) -> dict[str, str]:
    """The changes that point a shapes config to the data set in a folder, by dotted names."""
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    changes = {f'{loader}.dataset.data_root': folder for loader in loaders}
    cfg = Config.fromfile(config)
    for evaluator in ('val_evaluator', 'test_evaluator'):
        # Segmentation metrics have no file; they use what the data set loads.
        if 'ann_file' in cfg[evaluator]:
            changes[f'{evaluator}.ann_file'] = f'{folder}/annotations/instances_val.json'
    return changes
