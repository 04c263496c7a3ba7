"""Peak memory of training, each network in a process of its own.

On a GPU it is the most that torch had allocated. On a CPU it is the largest resident set size of
the process, minus that before the network was built. torch's own count of allocations would miss
what its libraries allocate, above all oneDNN. A process keeps freed memory, so only its first
network is measured. ``getrusage`` counts the memory of the parent as the child's. So the high-water
mark in ``/proc`` is read, if there is one, and reset before the first step. glibc's allocator has
its default settings.
"""
from __future__ import annotations

import contextlib
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import nn

from .networks import Subject, make_images
from .programs import run_once, training
from .setting import Workload
from .timing import Phases

_STATUS = Path('/proc/self/status')
# Elsewhere, as on Windows, nothing tells the memory of a process.
CAN_MEASURE_CPU = _STATUS.exists() or find_spec('resource') is not None
NUM_STEPS = 2  # in the second step there is an optimizer state


def measure_memory(subject: Subject, workload: Workload, static: bool = False) -> int:
    """Bytes of weights, gradients, optimizer and activations at the peak, in a new process."""
    with ProcessPoolExecutor(1, get_context('spawn')) as process:
        return process.submit(_measure, subject, workload, static, torch.get_num_threads()).result()


def _measure(subject: Subject, workload: Workload, static: bool, num_threads: int) -> int:
    torch.set_num_threads(num_threads)
    device = workload.setting.device if workload.setting.on_cuda else None
    # What libraries set up once does not belong to any network.
    run_once(_prepare(nn.Conv2d(3, 8, 3), (1, 32, 32), workload))
    before = _held(device)
    program = _prepare(subject.build(static), workload.shape, workload)
    if workload.setting.compile:
        run_once(program)  # compiling is not part of a step
    _reset_peak(device)
    for _ in range(NUM_STEPS):
        run_once(program)
    return _peak(device) - before


def _prepare(module: nn.Module, shape: tuple[int, int, int], workload: Workload) -> Phases:
    place = workload.setting.place
    return training(place(module), place(make_images(*shape)), workload.setting)


def _held(gpu: str | None) -> int:
    return torch.cuda.memory_allocated(gpu) if gpu else _status('VmRSS')


def _peak(gpu: str | None) -> int:
    return torch.cuda.max_memory_allocated(gpu) if gpu else _status('VmHWM')


def _reset_peak(gpu: str | None) -> None:
    """Resets the peak, which building a network may have raised."""
    if gpu:
        torch.cuda.reset_peak_memory_stats(gpu)
    with contextlib.suppress(OSError):  # some systems do not permit it
        Path('/proc/self/clear_refs').write_text('5')


def _status(field: str) -> int:
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f'{field}:'):
                return int(line.split()[1]) * 1024
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # In kilobytes, on macOS in bytes.
    return peak if sys.platform == 'darwin' else peak * 1024
