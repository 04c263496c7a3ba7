"""The programs that are timed and compared: inference and training steps, by phases."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kw_mm.layers.conv import KW_CONVS

from .setting import Setting
from .timing import Phases, Times

# The networks that are compared.
STATIC, FOLDED, KW, OPTIMISED = 'static', 'static, folded', 'KW', 'KW, optimised'
FORWARD, BACKWARD, OPTIMIZER = 'forward', 'backward', 'optimizer'
# The usual optimizer of detectors. The learning rate is tiny, so that a network stays finite though
# it trains on noise for long.
SGD = dict(lr=1e-9, momentum=0.9)


def as_tensors(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs of a layer or backbone as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def inference(module: nn.Module, x: Tensor, setting: Setting) -> Phases:
    """Inference of a placed module and input: a single phase ``forward``, in evaluation mode."""
    run = setting.callable(module.eval(), x)

    def forward(_: Any) -> Any:
        with torch.inference_mode(), setting.autocast():
            return run(x)

    return {FORWARD: forward}


def passes(module: nn.Module, x: Tensor, setting: Setting, needs_input_grad: bool = True,
           output_grads: Sequence[Tensor] = ()) -> Phases:
    """``forward`` and ``backward`` of a placed module and input, in the module's current mode.

    The backward pass starts from gradients of the outputs, by default random ones, so no loss is
    timed. Half precision needs no loss scaling here.
    """
    run = setting.callable(module)
    x = x.detach().requires_grad_(needs_input_grad)
    # The parameters of a layer do not include the cells of a shared warehouse.
    leaves = [x, *module.parameters(),
              *(layer.cells for layer in module.modules() if isinstance(layer, KW_CONVS))]
    grads: list[Tensor] = []

    def forward(_: Any) -> tuple[Tensor, ...]:
        # None rather than zero, so that the first gradient is not added to zeros.
        for leaf in leaves:
            leaf.grad = None
        with setting.autocast():
            return as_tensors(run(x))

    def backward(outputs: tuple[Tensor, ...]) -> None:
        if not grads:
            grads.extend(output_grads or (torch.randn_like(y) / y.numel()**0.5 for y in outputs))
        torch.autograd.backward(outputs, [grad.to(y) for grad, y in zip(grads, outputs)])

    return {FORWARD: forward, BACKWARD: backward}


def training(module: nn.Module, x: Tensor, setting: Setting) -> Phases:
    """A step on images: ``forward``, ``backward``, ``optimizer`` (SGD), which frees gradients."""
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], **SGD)

    def step(_: Any) -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return {**passes(module.train(), x, setting, needs_input_grad=False), OPTIMIZER: step}


def run_once(program: Phases) -> Any:
    """Runs all phases once and returns the result of the last."""
    value = None
    for phase in program.values():
        value = phase(value)
    return value


def summarise(times: Mapping[str, Times], floors: Mapping[str, float] | None = None
              ) -> dict[str, Any]:
    """Medians of every program and phase, and ratios to static, as plain data.

    Floors are seconds in addition to the static network's, and become ratios to static too.
    """
    ratios = {f'{name} / {base}': times[name].over(times[base])
              for base in (STATIC, FOLDED) if base in times
              for name in times if name not in (STATIC, FOLDED)}
    if BACKWARD in times[STATIC].phases:
        ratios[f'{KW} / {STATIC}, forward and backward'] = times[KW].over(
            times[STATIC], FORWARD, BACKWARD)
    base = times[STATIC].median()
    return dict(seconds={name: time.summary() for name, time in times.items()},
                ratios={name: ratio._asdict() for name, ratio in ratios.items()},
                **({} if floors is None else dict(floors={
                    name: 1 + more / base for name, more in floors.items()})))
