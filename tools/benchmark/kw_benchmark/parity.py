"""Checks, before any figure, that what is timed computes what the method says.

Compared are outputs for a small batch, before and after ``optimize_for_inference_``, and gradients
of all parameters if training is timed. They come from the same programs that are timed, with the
same device, precision, layout, compilation and CUDA graphs, and once more from single precision.
They are compared with the plain network in float64 (``formulas``), whose kernels are compared with
the loops of ``kw_mm.ops.reference`` for every distinct layer. The error of the plain network in the
same precision shows what rounding errors are usual.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from kw_mm.ops import reference

from .formulas import (
    attention_rows,
    copy_with,
    literal_alpha,
    plain_alpha,
    plain_conv,
    plain_kernel,
)
from .networks import SHAPE, distinct_layers, make_images, optimised, randomise_
from .programs import as_tensors, inference, passes, run_once
from .setting import Setting

# Relative errors allowed in float64, where only the order of additions differs.
EXACT = 1e-9
# Errors allowed in other precisions, as multiples of the plain network's. Single precision has room
# for another order of additions; half precisions show at once if something is computed in too low a
# precision.
ALLOWANCE = {torch.float32: 10, torch.bfloat16: 2, torch.float16: 2}
ROUNDINGS = 100  # for a single layer, relative to the precision it computes in
LEAST = 1e-6  # always allowed, because the plain network may happen to be exact
# How much of a layer the loops compute: mixtures, cells, and channels of a cell.
PART = 8


@dataclass(frozen=True)
class Check:
    """One comparison: the relative error and the allowed one."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number and small enough."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        return (f'{"ok" if self.passed else "FAILED":6} {self.name}: relative error '
                f'{self.error:.1e}, at most {self.tolerance:.1e}')


class ParityError(Exception):
    """A comparison failed; ``checks`` are all comparisons."""

    def __init__(self, checks: Sequence[Check]) -> None:
        super().__init__('\n'.join(map(str, checks)))
        self.checks = checks


def check_network(module: nn.Module, setting: Setting, memory_budget: int | None = None,
                  shape: tuple[int, int, int] = SHAPE, gradients: bool = True) -> list[Check]:
    """Compares a network with the method, after ``randomise_``.

    Batch norms use their running statistics, because with those of a batch of two, attentions would
    only depend on signs.

    Args:
        module: The network, on the CPU, in single precision. It is changed by ``randomise_``.
        setting: The setting in which it will be timed.
        memory_budget: That of the optimised copy.
        shape: Batch (at least two), height and width of the images.
        gradients: Whether to compare gradients too, which takes most of the time.

    Raises:
        ParityError: If a comparison fails.
    """
    x = make_images(*shape)
    randomise_(module, x)
    plain, double = copy_with(module, plain_conv), Setting(setting.device, torch.float64)
    outputs = _outputs(copy.deepcopy(plain), x, double)
    weights = [torch.randn_like(y) / math.sqrt(y.numel()) for y in outputs]
    truth = _gradients(plain, x, weights, double) if gradients else []
    checks = [check_formulas(double.place(copy.deepcopy(module)), shape)]
    for way in dict.fromkeys((setting, Setting(setting.device))):
        way.forget_compiled()
        eager = replace(way, compile=False, cuda_graphs=False)
        error = _output_error(_outputs(copy.deepcopy(plain), x, eager), outputs)
        # What is folded is rounded once more.
        rounded = copy.deepcopy(plain).to(way.dtype)
        folded = error + _output_error(_outputs(rounded, x, double), outputs)
        placed = way.place(copy.deepcopy(module))
        fast, _ = optimised(placed, memory_budget)
        checks += [Check(f'{name} in {way.label}', _output_error(_outputs(net, x, way), outputs),
                         _tolerance(way, usual)) for name, net, usual in (
                             ('outputs', placed, error), ('optimised outputs', fast, folded))]
        del placed, fast
        if gradients:
            limit = _tolerance(way, _gradient_error(_gradients(plain, x, weights, eager), truth))
            # In half precision the gradients of single tensors are noise, in plain torch too, so
            # the mean of their errors is taken.
            checks.append(Check(f'gradients in {way.label}', _gradient_error(
                _gradients(module, x, weights, way), truth), limit))
    return raise_on_failure(checks)


def check_formulas(module: nn.Module, shape: tuple[int, int, int]) -> Check:
    """Compares the plain formulas with the loops of ``kw_mm.ops.reference``, in float64."""
    errors = [0.0]
    with torch.inference_mode():
        for name, (_, *features), _ in distinct_layers(module, shape):
            layer = module.get_submodule(name)
            rows = attention_rows(layer, torch.randn(1, *features).to(layer.cells))
            part = rows[:, :PART]
            errors.append(_error(plain_alpha(layer, part), literal_alpha(layer, part)))
            some = (plain_alpha(layer, rows)[..., :PART], layer.cells[:PART, :PART, :PART],
                    layer.plan.grid, layer.kernel_size)
            errors.append(_error(plain_kernel(*some), reference.assemble_kernel(*some)))
    return Check('plain formulas in float64', _worst(errors), EXACT)


def compare_outputs(name: str, found: Tensor, expected: Tensor) -> Check:
    """Compares outputs of the same precision, within what that precision allows."""
    return Check(name, compare(found, expected), ROUNDINGS * torch.finfo(found.dtype).eps)


def compare(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest expected value."""
    return _error(found, expected.double())


def raise_on_failure(checks: list[Check]) -> list[Check]:
    """Returns comparisons that all passed; otherwise raises ``ParityError``."""
    if not all(check.passed for check in checks):
        raise ParityError(checks)
    return checks


def _tolerance(setting: Setting, plain_error: float) -> float:
    return max(ALLOWANCE[setting.dtype] * plain_error, LEAST)


def _outputs(module: nn.Module, x: Tensor, setting: Setting) -> tuple[Tensor, ...]:
    """Outputs in evaluation, from the program that is timed. The module is changed."""
    program = inference(setting.place(module), setting.place(x), setting)
    return as_tensors(run_once(program))


def _gradients(module: nn.Module, x: Tensor, weights: Sequence[Tensor],
               setting: Setting) -> list[Tensor]:
    """Gradients of ``sum(weights * outputs)`` for a copy's parameters, from the timed program."""
    module = setting.place(copy.deepcopy(module)).train()
    for layer in module.modules():
        # Stochastic depth and dropout would differ each time.
        if isinstance(layer, (_BatchNorm, _DropoutNd, DropPath)):
            layer.eval()
    run_once(passes(module, setting.place(x), setting, needs_input_grad=False,
                    output_grads=weights))
    return [torch.zeros_like(p) if p.grad is None else p.grad
            for p in module.parameters() if p.requires_grad]


def _output_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The error of the worst output, relative to its largest element."""
    return _worst([_error(a, b) for a, b in zip(found, truth)])


def _gradient_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The mean over tensors of a gradient's error, relative to its 2-norm."""
    return sum(_error(a, b, 2) for a, b in zip(found, truth)) / len(truth)


def _error(found: Tensor, truth: Tensor, norm: float = math.inf) -> float:
    difference = torch.linalg.vector_norm(found.double() - truth, norm)
    # If the expected values are all zero, any other value is an infinite error.
    return (difference / torch.linalg.vector_norm(truth, norm)).item() if difference != 0 else 0.0


def _worst(errors: Sequence[float]) -> float:
    # max() only notices a NaN if it comes first.
    return math.nan if any(map(math.isnan, errors)) else max(errors)
