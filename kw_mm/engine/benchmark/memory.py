"""Peak memory of training, each network in a process of its own.

On a GPU it is the most that torch had allocated. On a CPU it is the most that the system had given
the process (resident set size), above what it held before the network was built: torch's own
count of allocations misses what its libraries, oneDNN above all, allocate past it, and that is
memory that a user needs. A process keeps freed memory for later, so that only the first network of
a process is measured, and ``getrusage`` counts the parent's memory, from which a process is forked,
as the child's: what is read is the high-water mark in ``/proc``, where there is one, set back
before the first step. glibc's allocator is left as it comes.
"""
from __future__ import annotations

import contextlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .networks import build_backbone, make_images
from .programs import training
from .setting import Setting
from .suite import Workload

NUM_STEPS = 2  # the second has the optimizer's state beside it
_STATUS = Path('/proc/self/status')


@dataclass(frozen=True)
class Memory:
    """Peak memory of training.

    Attributes:
        total: Bytes of everything: weights, gradients, optimizer, activations.
        step: Bytes beyond weights and images.
    """

    total: int
    step: int


def measure_memory(name: str, kw_cfg: Mapping[str, Any] | None, options: Mapping[str, Any],
                   workload: Workload) -> Memory:
    """Measures training steps of a backbone in a new process.

    Args:
        name: Of the backbone, see ``build_backbone``.
        kw_cfg: Settings of its warehouses; None for the static twin.
        options: Of the backbone.
        workload: Its shape and setting.

    Raises:
        subprocess.CalledProcessError: If the process fails.
    """
    task = dict(name=name, kw_cfg=kw_cfg, options=options, shape=workload.shape,
                threads=torch.get_num_threads(), device=workload.setting.device,
                **workload.setting.describe())
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith('MALLOC_')}
    done = subprocess.run([sys.executable, '-m', __name__, json.dumps(task)], env=environment,
                          stdout=subprocess.PIPE, text=True, check=True)
    return Memory(**json.loads(done.stdout.splitlines()[-1]))


def _measure(task: Mapping[str, Any]) -> Memory:
    """Measures in this process."""
    torch.set_num_threads(task['threads'])
    setting = Setting(task['device'], getattr(torch, task['dtype']), task['amp'],
                      task['channels_last'])
    # What libraries set up once is nobody's in particular.
    _step(setting, torch.nn.Conv2d(3, 8, 3), (1, 32, 32))
    before = _held(setting)
    module = build_backbone(task['name'], task['kw_cfg'], **task['options'])
    program = _prepare(setting, module, task['shape'])
    built = _held(setting)
    _reset_peak(setting)
    for _ in range(NUM_STEPS):
        _run(program)
    peak = _peak(setting)
    return Memory(peak - before, peak - built)


def _step(setting: Setting, module: torch.nn.Module, shape: tuple[int, int, int]) -> None:
    _run(_prepare(setting, module, shape))


def _prepare(setting: Setting, module: torch.nn.Module, shape: tuple[int, int, int]) -> Any:
    return training(setting.place(module), setting.place(make_images(*shape)), setting)


def _run(program: Any) -> None:
    value = None
    for phase in program.values():
        value = phase(value)


def _held(setting: Setting) -> int:
    """Bytes held now."""
    if setting.on_cuda:
        return torch.cuda.memory_allocated(setting.device)
    return _status('VmRSS')


def _peak(setting: Setting) -> int:
    """Bytes held at most."""
    if setting.on_cuda:
        return torch.cuda.max_memory_allocated(setting.device)
    return _status('VmHWM')


def _reset_peak(setting: Setting) -> None:
    """Forgets the peak so far, which building a network may have raised."""
    if setting.on_cuda:
        torch.cuda.reset_peak_memory_stats(setting.device)
    else:
        # Some systems do not let a process; then the peak is that of the whole process.
        with contextlib.suppress(OSError):
            Path('/proc/self/clear_refs').write_text('5')


def _status(field: str) -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f'{field}:'):
                return int(line.split()[1]) * 1024
    # In kilobytes, on macOS in bytes.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 1024


if __name__ == '__main__':
    measured = _measure(json.loads(sys.argv[1]))
    print(json.dumps(dict(total=measured.total, step=measured.step)))
