"""Describes the machine, measures its rates, and computes the least time to mix kernels on it.

A dynamic network has to mix its kernels, in addition to what a static one does. The floor counts
only this: attention, pooling and convolving each sample with its own kernel are taken as free. So
no implementation of the counted method can be faster. Symbols: N samples, m mixtures, n cells of D
elements, hidden width h.
"""
from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from kw_mm.inference.budget import ACTIVE
from kw_mm.ops.compiled import instruction_set
from kw_mm.plan import LayerPlan
from kw_mm.versions import SUPPORTED, __version__, installed_version

from .setting import Setting
from .timing import time_in_turns

NUM_RUNS = 7  # the fastest counts, because a floor must not be too high
# Numbers that SGD with momentum moves per parameter: weight and momentum are read and written, the
# gradient is read.
SGD_ACCESSES = 5

# Ways to get the kernels, by their names in a report. The cheapest counts.
INFERENCE = dict(cells=('cells',), cells_or_bases=('cells', 'bases'),
                 cells_or_active_bases=('cells', 'active_bases'))
TRAINING = dict(cells=('training',))


@dataclass(frozen=True)
class Rates:
    """Multiply-adds of a large matrix product, and bytes read or copied in memory, per second."""

    operations: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """Bytes to and from memory, and multiply-adds."""

    num_bytes: int
    operations: int

    def seconds(self, rates: Rates) -> float:
        """The longer of the two, because memory and arithmetic can overlap."""
        return max(self.num_bytes / rates.bandwidth, self.operations / rates.operations)


def describe() -> dict[str, Any]:
    """What one must know to judge figures: processors, threads, versions, date."""
    found = dict(
        date=datetime.now(timezone.utc).isoformat(timespec='seconds'),
        cpu=cpu_name(),
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cpu_products=instruction_set() or 'none',
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        kw_mm=__version__,
        numpy=version('numpy'),
        **{package: number for package in SUPPORTED
           if (number := installed_version(package)) is not None})
    if torch.cuda.is_available():
        found.update(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda,
                     cudnn=torch.backends.cudnn.version(),
                     gpu_memory=torch.cuda.get_device_properties(0).total_memory)
    return found


def cpu_name() -> str:
    """The processor's name, if the system tells it."""
    info = Path('/proc/cpuinfo')
    if info.exists():
        for line in info.read_text(encoding='utf-8').splitlines():
            if line.startswith('model name'):
                return line.split(':', 1)[1].strip()
    return platform.processor() or platform.machine()


def measure_rates(setting: Setting, size: int | None = None, num_bytes: int = 2**29) -> Rates:
    """Measures matrix products and memory on the device, in the setting's precision.

    Matrices are ``size`` x ``size``; ``num_bytes`` are read, and must exceed all caches.
    """
    size = size or (8192 if setting.on_cuda else 2048)
    factory = dict(device=setting.device, dtype=setting.dtype)
    a, b = torch.randn(size, size, **factory), torch.randn(size, size, **factory)
    out = torch.empty_like(a)
    product = _fastest(lambda: torch.mm(a, b, out=out), setting.device)
    source = torch.ones(num_bytes // setting.dtype.itemsize, **factory)
    target = torch.zeros_like(source)
    # The highest rate counts. A sum only reads, but its additions may limit it.
    read = num_bytes / _fastest(source.sum, setting.device)
    copied = 2 * num_bytes / _fastest(lambda: target.copy_(source), setting.device)
    return Rates(size**3 / product, max(read, copied))


def _fastest(run: Callable[[], Any], device: str) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    times = time_in_turns({'run': {'run': lambda _: run()}}, device, NUM_RUNS, 1, min_seconds=0)
    return min(times['run'].rounds())


def assembly_costs(batch: int, mixtures: int, cells: int, cell_size: int, hidden: int,
                   itemsize: int = 4) -> dict[str, Cost]:
    """What it takes to mix the kernels of one layer.

    * ``cells``, ``alpha @ cells``: every cell is read once, ``N m n D`` multiply-adds.
    * ``bases``: for inference, the attention's last linear layer is multiplied with the cells in
      advance. Its weight and bias give ``h + 1`` kernels of the layer's size, which are read and
      mixed.
    * ``active_bases``: only bases of active hidden units. If units are active at random, a share of
      ``1 - (1 - ACTIVE)^N`` is active for at least one of N samples: these are read, and each
      sample mixes its own.
    * ``training``: mixing cells forward and backward. The gradients of mixing weights and of cells
      each take a product of the same size as forward. Cells are read twice, once forward and once
      backward. Their gradient is read and written, because each layer of a warehouse adds to it.
    """
    size = mixtures * cell_size
    read = 1 - (1 - ACTIVE)**batch
    forward = Cost(cells * cell_size * itemsize, batch * size * cells)
    return dict(
        cells=forward,
        bases=Cost((hidden + 1) * size * itemsize, batch * (hidden + 1) * size),
        active_bases=Cost(round((hidden * read + 1) * size) * itemsize,
                          round(batch * (hidden * ACTIVE + 1) * size)),
        training=Cost(4 * forward.num_bytes, 3 * forward.operations))


def layer_costs(plan: LayerPlan, batch: int, itemsize: int = 4) -> dict[str, Cost]:
    """``assembly_costs`` of a planned layer."""
    return assembly_costs(batch, plan.num_mixtures, plan.num_cells, math.prod(plan.cell_shape),
                          plan.hidden, itemsize)


def assembly_seconds(layers: Iterable[dict[str, Cost]], rates: Rates,
                     training: bool = False) -> dict[str, float]:
    """The least time to mix the kernels of all layers, one after another, in each way."""
    layers = list(layers)
    return {way: sum(min(costs[name].seconds(rates) for name in names) for costs in layers)
            for way, names in (TRAINING if training else INFERENCE).items()}


def optimizer_seconds(extra_parameters: int, rates: Rates, itemsize: int = 4) -> float:
    """Time of SGD with momentum for parameters beyond those of the static network; at least 0."""
    return max(extra_parameters, 0) * SGD_ACCESSES * itemsize / rates.bandwidth
