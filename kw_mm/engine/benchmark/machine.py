"""The machine at hand: its name, its versions, and what it can do in a second."""
from __future__ import annotations

import platform
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ...ops.compiled import instruction_set
from ...versions import SUPPORTED, __version__, installed_version
from .floor import Rates
from .setting import Setting
from .timing import synchronise

NUM_RUNS = 7  # of which the fastest counts: a floor must not be too high


def describe() -> dict[str, Any]:
    """What a reader must know to judge figures: processors, threads, versions, date."""
    found = dict(
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        cpu=cpu_name(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_products=instruction_set() or 'none',
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        kw_mm=__version__,
        numpy=version('numpy'),
        **{package: installed_version(package) for package in SUPPORTED})
    if torch.cuda.is_available():
        found.update(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda,
                     cudnn=torch.backends.cudnn.version(),
                     gpu_memory=torch.cuda.get_device_properties(0).total_memory)
    return found


def cpu_name() -> str:
    """The processor's name, as far as the system tells it."""
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def measure_rates(setting: Setting, size: int | None = None,
                  num_bytes: int = 2**29) -> Rates:
    """Measures matrix products and memory on the device, in the setting's precision.

    Args:
        setting: Where and in which precision.
        size: Rows and columns of the matrices; by default 2048, of a GPU 8192.
        num_bytes: Size of the tensor that is read; it must not fit into a cache.
    """
    size = size or (8192 if setting.on_cuda else 2048)
    dtype = setting.compute_dtype
    factory = dict(device=setting.device, dtype=dtype)
    a, b = torch.randn(size, size, **factory), torch.randn(size, size, **factory)
    out = torch.empty_like(a)
    product = _fastest(lambda: torch.mm(a, b, out=out), setting.device)
    source = torch.ones(num_bytes // dtype.itemsize, **factory)
    target = torch.zeros_like(source)
    # Whatever moves most: a sum reads only, but may be bound by its additions.
    read = num_bytes / _fastest(source.sum, setting.device)
    copied = 2 * num_bytes / _fastest(lambda: target.copy_(source), setting.device)
    return Rates(size**3 / product, max(read, copied))


def _fastest(run: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of some runs, after one to warm up."""
    times = []
    for _ in range(NUM_RUNS + 1):
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])
