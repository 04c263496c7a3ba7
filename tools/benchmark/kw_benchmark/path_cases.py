"""Compares every way to convolve each sample with its own kernel (``kw_mm.ops.path_table``).

``tests`` run it on a CPU, ``tests/gpu`` and ``python tools/benchmark gpu`` on a GPU.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kw_mm.ops import convolution_paths, reference
from kw_mm.ops.path_table import KINDS

from .gpu_cases import without_tf32
from .parity import ALLOWANCE, EXACT, Check, compare, raise_on_failure
from .setting import Setting

BATCH = 3


class Geometry(NamedTuple):
    """Of a small convolution with two dimensions."""

    kind: str
    kernel_size: tuple[int, int]
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] | str = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


GEOMETRIES = (
    Geometry('pointwise', (1, 1)), Geometry('pointwise', (1, 1), (2, 2)),
    Geometry('dense', (3, 3), padding=(1, 1)), Geometry('dense', (3, 3), (2, 2), (1, 1)),
    Geometry('dense', (3, 2), (1, 2), (2, 1), (2, 1)), Geometry('dense', (1, 1), padding=(1, 0)),
    Geometry('grouped', (3, 3), (2, 1), (1, 1), (1, 2), 2), Geometry('grouped', (1, 1), groups=4),
    Geometry('grouped', (3, 3), padding=(1, 1), groups=8),
    Geometry('grouped', (3, 3), padding='same'))


@dataclass(frozen=True)
class PathCase:
    """One way, for every geometry that it takes, in a setting."""

    path: str
    setting: Setting

    def __str__(self) -> str:
        return f'{self.path}, {self.setting.label}'


def find_path_cases(device: str) -> dict[str, list[PathCase]]:
    """All ways, by name, in every precision, layout and under autocast."""
    precisions = [(torch.float64, False), (torch.float32, False), (torch.bfloat16, False),
                  (torch.bfloat16, True), (torch.float16, False), (torch.float16, True)]
    names = dict.fromkeys(path for known in KINDS.values() for path in known)
    return {path: [PathCase(path, Setting(device, dtype, amp, layout))
                   for dtype, amp in precisions for layout in (True, False)] for path in names}


def run_path_case(case: PathCase) -> list[Check]:
    """Compares outputs and gradients with the loop of ``reference.dynamic_conv`` in float64.

    In a lower precision that loop's own errors are the measure.

    Raises:
        ParityError: If something differs.
    """
    setting, double = case.setting, Setting(case.setting.device, torch.float64)
    path = getattr(convolution_paths, case.path)
    checks = []
    for geometry in GEOMETRIES:
        if case.path not in KINDS[geometry.kind]:
            continue
        torch.manual_seed(0)
        channels, size = 8, geometry.kernel_size
        tensors = (torch.randn(BATCH, channels, 9, 8), torch.randn(channels),
                   torch.randn(BATCH, channels, channels // geometry.groups, *size))
        with without_tf32():
            truth = _results(reference.dynamic_conv, tensors, geometry, double)
            usual = _results(reference.dynamic_conv, tensors, geometry, setting)
            found = _results(lambda x, kernel, bias, *rest: path(
                x, kernel, bias, setting.channels_last, *rest), tensors, geometry, setting)
        for name, got, plain, wanted in zip(('outputs', *(f'gradients of the {name}' for name in (
                'map', 'bias', 'kernels'))), found, usual, truth):
            # A few elements only, so that the loop may happen to be nearly exact.
            limit = EXACT if setting.dtype == torch.float64 else max(
                ALLOWANCE[setting.dtype] * compare(plain, wanted),
                4 * torch.finfo(setting.dtype).eps)
            checks.append(Check(f'{name}, {geometry}', compare(got, wanted), limit))
    return raise_on_failure(checks)


def _results(function: Any, tensors: Sequence[Tensor], geometry: Geometry,
             setting: Setting) -> list[Tensor]:
    """Outputs, and gradients of map, bias and kernels."""
    x, bias, kernel = (t.to(setting.device, torch.float32 if setting.amp else setting.dtype)
                       for t in tensors)
    if setting.channels_last:
        # As maps and assembled kernels lie in memory then.
        x, kernel = (t.movedim(d, -1).contiguous().movedim(-1, d) for t, d in ((x, 1), (kernel, 2)))
    if setting.amp:
        # Kernels are mixed in this precision.
        kernel = kernel.to(setting.dtype)
    leaves = [t.detach().requires_grad_() for t in (x, bias, kernel)]
    with setting.autocast():
        y = function(leaves[0], leaves[2], leaves[1], *geometry[2:])
    torch.manual_seed(1)
    weights = torch.randn(y.shape).to(y)
    return [y, *torch.autograd.grad(y, leaves, weights)]
