"""KW convolutions by the formulas of the method, with loops and with torch's operations.

Fast code is compared with the second kind. It has gradients, it has the usual rounding errors of
torch in each precision, and it takes a second where the loops of ``kw_mm.ops.reference`` take
minutes. It is itself compared with these loops on a part of every layer.
"""
from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kw_mm.layers.conv import KW_CONVS
from kw_mm.ops import reference


def plain_conv(layer: nn.Module, x: Tensor) -> Tensor:
    """A KW convolution with torch's ordinary operations (method, sections 3 and 4).

    Args:
        layer: The layer with its weights and settings.
        x: ``(N, C_in, *spatial)``.

    Returns:
        ``(N, C_out, *spatial)``.
    """
    return _convolve(layer, x, plain_alpha(layer, attention_rows(layer, x)), plain_kernel)


def literal_conv(layer: nn.Module, x: Tensor) -> Tensor:
    """``plain_conv`` by the loops of ``kw_mm.ops.reference``."""
    return _convolve(layer, x, literal_alpha(layer, attention_rows(layer, x)),
                     reference.assemble_kernel)


def attention_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The output of the attention's second linear layer for each mixture, ``(N, m, columns)``."""
    attention = layer.attention
    hidden = F.relu(attention.norm1(attention.fc1(x.flatten(2).mean(-1))))
    return attention.fc2(hidden).unflatten(1, (layer.plan.num_mixtures, -1))


def plain_alpha(layer: nn.Module, rows: Tensor) -> Tensor:
    """Mixing weights of as many of the first mixtures as there are rows."""
    attention, own, count = layer.attention, layer.plan.assignment, rows.shape[1]
    if layer.plan.num_basis:
        others = F.linear(rows[..., own.num_cells:-1], attention.fc3.weight)
        rows = torch.cat((others[..., :own.first_cell], rows[..., :own.num_cells],
                          others[..., own.first_cell:], rows[..., -1:]), -1)
        rows = rows + attention.basis_bias.view(-1, rows.shape[-1])[:count]
    z = rows.double() if rows.dtype == torch.float64 else rows.float()
    alpha = z / (z.abs().sum(-1, keepdim=True) + reference.EPS)
    beta = attention.beta[:count]
    return ((1 - attention.tau) * alpha[..., :-1] + attention.tau * beta).to(rows.dtype)


def literal_alpha(layer: nn.Module, rows: Tensor) -> Tensor:
    """``plain_alpha`` by loops."""
    attention, count = layer.attention, rows.shape[1]
    if layer.plan.num_basis:
        bias = attention.basis_bias.view(layer.plan.num_mixtures, -1)[:count].flatten()
        rows = reference.basis_logits(rows, attention.fc3.weight, bias,
                                      layer.plan.assignment.first_cell)
    return reference.mixing_weights(rows, attention.beta[:count], attention.tau)


def plain_kernel(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                 kernel_size: Sequence[int]) -> Tensor:
    """``reference.assemble_kernel`` with torch's ordinary operations."""
    mixtures = torch.einsum('bsoin,ncdk->bocidsk', alpha.unflatten(1, grid), cells.flatten(3))
    out_channels, in_channels = grid[1] * cells.shape[1], grid[2] * cells.shape[2]
    return mixtures.reshape(len(alpha), out_channels, in_channels,
                            math.prod(kernel_size)).unflatten(-1, tuple(kernel_size))


def copy_with(module: nn.Module, conv: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A copy of a module whose KW convolutions compute ``plain_conv`` or ``literal_conv``.

    That includes those inside ``KWLinear``. Everything else runs as before.
    """
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, KW_CONVS):
            layer.forward = MethodType(conv, layer)
    return module


def _convolve(layer: nn.Module, x: Tensor, alpha: Tensor,
              assemble: Callable[..., Tensor]) -> Tensor:
    kernel = assemble(alpha, layer.cells, layer.plan.grid, layer.kernel_size)
    padding = layer.padding
    if layer.padding_mode != 'zeros':
        x = F.pad(x, layer.pads, mode=layer.padding_mode)
        padding = (0,) * layer.num_dims
    return reference.dynamic_conv(x, kernel, layer.bias, layer.stride, padding, layer.dilation,
                                  layer.groups)
