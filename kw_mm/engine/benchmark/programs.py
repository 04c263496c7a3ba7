"""What is timed: inference and training steps of a network, phase by phase."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .literal import KW_CONVS
from .setting import Setting
from .timing import Phases

FORWARD, BACKWARD, OPTIMIZER = 'forward', 'backward', 'optimizer'
# Detectors' usual one. Its learning rate is tiny, for a network that is fed noise for long must
# stay finite.
SGD = dict(lr=1e-9, momentum=0.9)


def as_tensors(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a layer or backbone as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def inference(module: nn.Module, x: Tensor, setting: Setting) -> Phases:
    """Inference, the one phase ``forward``, in evaluation mode.

    Args:
        module: Placed by the setting.
        x: Images or features, placed as well.
        setting: How to run.
    """
    run = setting.callable(module.eval(), x)

    def forward(_: Any) -> Any:
        with torch.inference_mode(), setting.autocast():
            return run(x)

    return {FORWARD: forward}


def training_pass(module: nn.Module, x: Tensor, setting: Setting,
                  needs_input_grad: bool = True) -> Phases:
    """``forward`` and ``backward`` of a module in training.

    The backward pass starts from random gradients of the outputs, so that no loss is timed. Half
    precision needs no loss scaling here.

    Args:
        module: Placed by the setting; it is set to training.
        x: Images or features, placed as well.
        setting: How to run.
        needs_input_grad: Whether the gradient of ``x`` is computed, as features' is.
    """
    run = setting.callable(module.train())
    x = x.detach().requires_grad_(needs_input_grad)
    # The cells of a layer of shared warehouses are not among its parameters.
    leaves = [x, *module.parameters(),
              *(layer.cells for layer in module.modules() if isinstance(layer, KW_CONVS))]
    grads: list[Tensor] = []

    def forward(_: Any) -> tuple[Tensor, ...]:
        # None rather than zero: whoever comes first need not add.
        for leaf in leaves:
            leaf.grad = None
        with setting.autocast():
            return as_tensors(run(x))

    def backward(outputs: tuple[Tensor, ...]) -> None:
        if not grads:
            grads.extend(torch.randn_like(y) / y.numel()**0.5 for y in outputs)
        torch.autograd.backward(outputs, grads)

    return {FORWARD: forward, BACKWARD: backward}


def training(module: nn.Module, x: Tensor, setting: Setting) -> Phases:
    """A training step on images: ``forward``, ``backward``, ``optimizer`` (SGD with momentum).

    Arguments are those of ``training_pass``. Gradients are freed at the end.
    """
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], **SGD)

    def step(_: Any) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {**training_pass(module, x, setting, needs_input_grad=False), OPTIMIZER: step}
