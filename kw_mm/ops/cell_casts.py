"""Cells in a lower precision, converted once a step and not once a layer.

Under autocast every layer of a warehouse mixes the same cells in autocast's precision. Training
converts them once, because the collector of their gradients does (``cell_gradients``), and so does
a compiler, which sees equal conversions. Here inference does: the first layer that asks converts,
the others get the same copy. When every layer of the warehouse has had it, it is dropped, so that
no memory stays occupied between steps and the next step sees new values, whoever wrote them. A
layer that asks again begins a new step as well.
"""
from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .cell_gradients import is_undisturbed


class _Step(threading.local):
    """The copies of the steps that a thread is in, by cells."""

    def __init__(self) -> None:
        self.copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


class _Copy:
    """Converted cells, and the layers that have had them."""

    def __init__(self, state: Any, cells: Tensor) -> None:
        self.state = state
        self.cells = cells
        self.layers: set[str] = set()


_step = _Step()


def cast_once(cells: Tensor, dtype: torch.dtype, layer: str, num_layers: int) -> Tensor:
    """Returns cells for a layer to mix: in ``dtype`` if that is narrower, converted once.

    Args:
        cells: A warehouse's, ``(n, c_out, c_in, *k)``.
        dtype: Of the mixtures.
        layer: Who asks, by its name in the plan.
        num_layers: How many layers use these cells.

    Returns:
        ``cells`` themselves, if they are as narrow, no other layer uses them, they need a gradient,
        or a compiler, transform or mode is at work.
    """
    if (num_layers < 2 or cells.dtype.itemsize <= dtype.itemsize or not is_undisturbed()
            or type(cells) not in (Tensor, nn.Parameter) or cells.is_inference()
            or (torch.is_grad_enabled() and cells.requires_grad)):
        return cells
    # A parameter stays the same object when its memory changes, as by ``.to()``, or its values.
    state = cells.data_ptr(), cells._version, dtype, torch.is_inference_mode_enabled()
    copy = _step.copies.get(cells)
    if copy is None or copy.state != state or layer in copy.layers:
        copy = _step.copies[cells] = _Copy(state, cells.detach().to(dtype))
    copy.layers.add(layer)
    if len(copy.layers) == num_layers:
        del _step.copies[cells]
    return copy.cells
