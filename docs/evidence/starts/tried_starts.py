"""Starts that were tried beside the one that StaticPretrained makes; see docs/evidence.md.

For configs: ``PYTHONPATH=docs/evidence/starts``, and ``custom_imports`` with ``tried_starts``.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, WEIGHT_INITIALIZERS
from torch import nn

from kw_mm.layers import Attention, static_start
from kw_mm.layers.conv import KW_CONVS
from kw_mm.models import StaticPretrained


@WEIGHT_INITIALIZERS.register_module()
class TriedStart(StaticPretrained):
    """A static start whose logits do not grow with the number of cells, or grow otherwise.

    Args:
        checkpoint: See ``StaticPretrained``.
        cells: The logit is ``4 * max(1, n / cells)``; None for 4 with any number of cells.
        copies: Whether the cells that no mixture starts from become copies of those that are used,
            and share their mixing weight, by parts that differ between images and cancel.
        prefix: See ``StaticPretrained``.
    """

    def __init__(self, checkpoint: str, cells: float | None = None, copies: bool = False,
                 prefix: str | None = None) -> None:
        super().__init__(checkpoint, prefix)
        self.cells = math.inf if cells is None else cells
        self.copies = copies

    def __call__(self, module: nn.Module) -> None:
        default = static_start.SELECT_CELLS
        static_start.SELECT_CELLS = self.cells  # type: ignore[assignment]
        try:
            super().__call__(module)
        finally:
            static_start.SELECT_CELLS = default
        if self.copies:
            for layer in module.modules():
                if isinstance(layer, KW_CONVS):
                    share_with_copies_(layer)


@torch.no_grad()
def share_with_copies_(layer: Any) -> None:
    """Splits each mixture's weight among copies of its cell; the kernel stays what it was.

    With layer norm no hidden vector is longer than the root of its length, so that no logit
    changes its sign at first, and the sum of magnitudes is the same for every image.
    """
    attention, own, hidden = layer.attention, layer.plan.assignment, layer.plan.hidden
    copies = own.num_cells // layer.plan.num_mixtures
    if copies < 2:
        return
    with_basis = attention.basis_bias is not None
    bias = attention.basis_bias if with_basis else attention.fc2.bias
    logits = bias.view(layer.plan.num_mixtures, -1)
    weight = attention.fc2.weight.view(layer.plan.num_mixtures, -1, hidden)
    for row, cell in enumerate(own.columns):
        logit = logits[row, cell] / copies
        layer.cells[cell:cell + copies] = layer.cells[cell]
        logits[row, cell:cell + copies] = logit
        parts = torch.randn(copies, hidden, device=weight.device)
        parts -= parts.mean(0)
        parts *= 0.9 * logit / math.sqrt(hidden) / parts.norm(dim=1).max()
        first = cell - own.first_cell if with_basis else cell
        weight[row, first:first + copies] = parts.to(weight)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TriedConstructor(DefaultOptimWrapperConstructor):
    """Divides the learning rate of the attentions' last layers, by a number or by the cells n.

    In ``paramwise_cfg``: ``divisor``, a number, or None for n.
    """

    def add_params(self, params: list, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        first = len(params)
        super().add_params(params, module, *args, **kwargs)
        if isinstance(module, Attention):
            divisor = self.paramwise_cfg.get('divisor') or module.beta.shape[1]
            last = {id(p) for p in (*module.fc2.parameters(), module.basis_bias) if p is not None}
            for group in params[first:]:
                if id(group['params'][0]) in last:
                    group['lr'] = self.base_lr / divisor
