"""The check before every figure: the network under test equals the method's literal reference.

A fast network that computes something else is not fast. Compared, on a small batch, are

* outputs in float64 with those of the literal network, before and after
  ``optimize_for_inference_``;
* gradients of all parameters in float64 with those of the plain network, whose outputs are
  compared with the literal network's as well (its own backward pass would take too long);
* all of it in the precision to be timed with what float64 gave, where the plain network in that
  precision tells what error is torch's own.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from .literal import copy_with, literal_conv, plain_conv
from .networks import make_images, optimised, randomise_
from .programs import as_tensors
from .setting import Setting

SHAPE = (2, 64, 64)  # images of the check: batch, height, width
# Relative errors in float64: another order of additions and nothing more.
EXACT = 1e-9
# In other precisions, times the plain network's own error. Single precision has room for
# products in another order; half precisions show at once what is computed in too low a one.
ALLOWANCE = {torch.float32: 10, torch.bfloat16: 2, torch.float16: 2}
ROUNDINGS = 100  # of one layer, to the precision it computes in
LEAST = 1e-6  # tolerated in any case, where the plain network happens to be exact


@dataclass(frozen=True)
class Check:
    """One comparison: the relative error and what is tolerated."""

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
    """Something computes what it should not; its speed is of no interest.

    Attributes:
        checks: All comparisons, those that passed included.
    """

    def __init__(self, checks: Sequence[Check]) -> None:
        super().__init__('\n'.join(map(str, checks)))
        self.checks = checks


def check_network(module: nn.Module, setting: Setting, memory_budget: int | None = None,
                  shape: tuple[int, int, int] = SHAPE) -> list[Check]:
    """Compares a network with the reference, after giving it random statistics.

    Args:
        module: Takes images; ``randomise_`` changes it.
        setting: The precision to be timed in.
        memory_budget: For the optimised copy.
        shape: Batch (at least two), height and width of the images.

    Returns:
        All comparisons.

    Raises:
        ParityError: If one fails.
    """
    x = make_images(*shape)
    randomise_(module, x)
    return raise_on_failure([*check_outputs(module, x, setting, memory_budget),
                             *check_gradients(module, x, setting)])


def check_outputs(module: nn.Module, x: Tensor, setting: Setting,
                  memory_budget: int | None = None) -> list[Check]:
    """Compares outputs in evaluation mode, before and after optimisation.

    Args:
        module: On the CPU, in single precision.
        x: Its input, likewise.
        setting: The precision to be timed in.
        memory_budget: For the optimised copy.
    """
    precise, module = _precise(setting), copy.deepcopy(module).eval()
    plain = copy_with(module, plain_conv)
    truth = _outputs(copy_with(module, literal_conv), x, precise)
    checks = [Check('plain outputs in float64',
                    _output_error(_outputs(copy.deepcopy(plain), x, precise), truth), EXACT)]
    for way in (precise, setting):
        limit = _tolerance(way, lambda way=way: _output_error(
            _outputs(copy.deepcopy(plain), x, way), truth))
        placed = way.place(copy.deepcopy(module))
        fast, _ = optimised(placed, memory_budget)
        for name, network in (('outputs', placed), ('optimised outputs', fast)):
            checks.append(Check(f'{name} in {_name(way)}',
                                _output_error(_outputs(network, x, way), truth), limit))
    return checks


def check_gradients(module: nn.Module, x: Tensor, setting: Setting) -> list[Check]:
    """Compares gradients in training mode, batch norms keeping to their running statistics.

    Of a batch of two their own would leave the attentions nothing but signs. Single tensors'
    gradients in half precision are noise, in torch's hands too, so the error is their mean.
    Arguments are those of ``check_outputs``.
    """
    precise, plain = _precise(setting), copy_with(module, plain_conv)
    with torch.no_grad():
        outputs = _run(_train_mode(copy.deepcopy(plain)), x, precise)
    weights = [torch.randn_like(y) / math.sqrt(y.numel()) for y in outputs]
    truth = _gradients(plain, x, weights, precise)
    checks = []
    for way in (precise, setting):
        limit = _tolerance(way, lambda way=way: _gradient_error(
            _gradients(plain, x, weights, way), truth))
        checks.append(Check(f'gradients in {_name(way)}', _gradient_error(
            _gradients(module, x, weights, way), truth), limit))
    return checks


def compare_outputs(name: str, found: Tensor, expected: Tensor) -> Check:
    """Compares outputs of one precision, as far as that goes."""
    return Check(name, _output_error([found], [expected.double()]),
                 ROUNDINGS * torch.finfo(found.dtype).eps)


def raise_on_failure(checks: list[Check]) -> list[Check]:
    """Returns comparisons that all passed.

    Raises:
        ParityError: If one did not.
    """
    if not all(check.passed for check in checks):
        raise ParityError(checks)
    return checks


def _precise(setting: Setting) -> Setting:
    return Setting(setting.device, torch.float64)


def _name(setting: Setting) -> str:
    return str(setting.dtype).removeprefix('torch.')


def _tolerance(setting: Setting, plain_error: Callable[[], float]) -> float:
    allowance = ALLOWANCE.get(setting.dtype)
    return max(allowance * plain_error(), LEAST) if allowance else EXACT


def _run(module: nn.Module, x: Tensor, setting: Setting) -> tuple[Tensor, ...]:
    with setting.autocast():
        return as_tensors(setting.place(module)(setting.place(x)))


def _outputs(module: nn.Module, x: Tensor, setting: Setting) -> list[Tensor]:
    """Outputs in the setting's precision, to which the module is changed."""
    with torch.inference_mode():
        return list(_run(module, x, setting))


def _train_mode(module: nn.Module) -> nn.Module:
    module.train()
    for layer in module.modules():
        # What drops at random would drop other things each time.
        if isinstance(layer, (_BatchNorm, _DropoutNd, DropPath)):
            layer.eval()
    return module


def _gradients(module: nn.Module, x: Tensor, weights: Sequence[Tensor],
               setting: Setting) -> list[Tensor]:
    """Gradients of ``sum(weights * outputs)`` by a copy's parameters."""
    module = _train_mode(copy.deepcopy(module))
    outputs = _run(module, x, setting)
    leaves = [p for p in module.parameters() if p.requires_grad]
    return list(torch.autograd.grad(
        outputs, leaves, [w.to(y.dtype) for w, y in zip(weights, outputs)], allow_unused=True,
        materialize_grads=True))


def _output_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The error of the worst output, relative to its largest element."""
    errors = _errors(found, truth, math.inf)
    # max() would let a NaN pass that is not the first.
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _gradient_error(found: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The mean over tensors of a gradient's error, relative to its 2-norm."""
    errors = _errors(found, truth, 2)
    return sum(errors) / len(errors)


def _errors(found: Sequence[Tensor], truth: Sequence[Tensor], kind: float) -> list[float]:
    errors = []
    for a, b in zip(found, truth):
        difference = torch.linalg.vector_norm(a.double() - b, kind)
        # Where all is zero, all must be zero: anything else is infinitely wrong.
        errors.append((difference / torch.linalg.vector_norm(b, kind)).item()
                      if difference != 0 else 0.0)
    return errors
