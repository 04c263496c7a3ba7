"""Helpers for tests of ``optimize_for_inference_``."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from kw_mm import OptimizationReport, optimize_for_inference_
from kw_mm.layers import Attention


def perturb_norms_(module: nn.Module) -> nn.Module:
    """Makes norms neither the identity nor zero, in place."""
    for layer in module.modules():
        if isinstance(layer, (_BatchNorm, nn.LayerNorm, nn.GroupNorm)) and layer.weight is not None:
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None:
            nn.init.normal_(layer.running_mean, 0, 0.2)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return module


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Replaces initial zeros and ones by random values, in place, and sets evaluation."""
    torch.manual_seed(seed)
    perturb_norms_(module)
    for layer in module.modules():
        if isinstance(layer, Attention):
            bias = layer.fc2.bias if layer.basis_bias is None else layer.basis_bias
            nn.init.normal_(bias, 0, 0.1)
        elif getattr(layer, 'gamma', None) is not None:
            nn.init.uniform_(layer.gamma, 0.5, 1.5)
        elif isinstance(getattr(layer, 'bias', None), nn.Parameter):
            nn.init.normal_(layer.bias, 0, 0.2)
    module.eval()  # on a line of its own, because not every module returns itself
    return module


def optimised(module: nn.Module, memory_budget: int | None = None
              ) -> tuple[nn.Module, OptimizationReport]:
    """An optimised copy."""
    twin = copy.deepcopy(module)
    return twin, optimize_for_inference_(twin, memory_budget)


@contextmanager
def bases_everywhere() -> Iterator[None]:
    """Makes bases pay for every layer, however small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('kw_mm.inference.budget.MIN_BASIS_INPLANES', 0)
        patch.setattr('kw_mm.inference.budget.BALANCE', 1e-6)
        yield


def optimised_with(kind: str, module: nn.Module) -> tuple[nn.Module, OptimizationReport]:
    """A copy optimised with ``'bases'`` in every layer, with ``'cells'``, or ``'default'``."""
    if kind != 'bases':
        return optimised(module, 0 if kind == 'cells' else None)
    with bases_everywhere():
        twin, report = optimised(module)
    assert all(layer.num_bases for layer in report.layers)
    return twin, report


def outputs(module: nn.Module, x: Tensor, grad: bool = False) -> tuple[Tensor, ...]:
    """The outputs of a module as a tuple."""
    with torch.set_grad_enabled(grad):
        y = module(x.clone())  # some begin with an activation in place
    return (y,) if isinstance(y, Tensor) else tuple(y)


def error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative error of an output, in the 2-norm."""
    worst = 0.0
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        if b.numel():
            assert a.isfinite().all()
            worst = max(worst, ((a.double() - b.double()).norm() / b.double().norm()).item())
    return worst
