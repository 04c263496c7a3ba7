"""Networks that every faster one must equal: one of the reference functions, one of plain torch."""
from __future__ import annotations

import copy
import math
from collections.abc import Callable
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...layers import KWConv1d, KWConv2d, KWConv3d
from ...ops import reference

KW_CONVS = (KWConv1d, KWConv2d, KWConv3d)


def literal_conv(layer: nn.Module, x: Tensor) -> Tensor:
    """A KW convolution from the reference functions alone (method, sections 3 and 4).

    Args:
        layer: The layer, whose weights and settings are read.
        x: ``(N, C_in, *spatial)``.

    Returns:
        ``(N, C_out, *spatial)``.
    """
    attention, plan = layer.attention, layer.plan
    rows = _rows(layer, x)
    if plan.num_basis:
        rows = reference.basis_logits(rows, attention.fc3.weight, attention.basis_bias,
                                      plan.assignment.first_cell)
    alpha = reference.mixing_weights(rows, attention.beta, attention.tau)
    kernel = reference.assemble_kernel(alpha, layer.cells, plan.grid, layer.kernel_size)
    return _convolve(layer, x, kernel)


def plain_conv(layer: nn.Module, x: Tensor) -> Tensor:
    """``literal_conv`` with torch's ordinary operations in the place of loops.

    The literal backward pass is a graph of millions of nodes. This one is differentiable in
    reasonable time, and in a low precision errs as ordinary torch does there. It belongs to the
    check: it follows the method, and never the fast paths.
    """
    attention, plan = layer.attention, layer.plan
    rows = _rows(layer, x)
    if plan.num_basis:
        local, first = plan.assignment.num_cells, plan.assignment.first_cell
        others = F.linear(rows[..., local:-1], attention.fc3.weight)
        rows = torch.cat((others[..., :first], rows[..., :local], others[..., first:],
                          rows[..., -1:]), -1)
        rows = rows + attention.basis_bias.view(rows.shape[1:])
    z = rows.double() if rows.dtype == torch.float64 else rows.float()
    alpha = z / (z.abs().sum(-1, keepdim=True) + reference.EPS)
    alpha = ((1 - attention.tau) * alpha[..., :-1] + attention.tau * attention.beta).to(rows.dtype)
    mixtures = torch.einsum('bsoin,ncdk->bocidsk', alpha.unflatten(1, plan.grid),
                            layer.cells.flatten(3))
    positions = math.prod(layer.kernel_size)
    kernel = mixtures.reshape(len(x), layer.out_channels, layer.in_channels // layer.groups,
                              positions).unflatten(-1, layer.kernel_size)
    return _convolve(layer, x, kernel)


def copy_with(module: nn.Module, conv: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    """A copy of a module whose KW convolutions compute ``literal_conv`` or ``plain_conv``.

    Convolutions that stand alone and those inside ``KWLinear`` are among them; all else runs as
    it is. Literal copies are slow: a minute for a network with thousands of cells.
    """
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, KW_CONVS):
            layer.forward = MethodType(conv, layer)
    return module


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What the attention's second linear layer gives each mixture."""
    attention = layer.attention
    hidden = F.relu(attention.norm1(attention.fc1(x.flatten(2).mean(-1))))
    return attention.fc2(hidden).unflatten(1, (layer.plan.num_mixtures, -1))


def _convolve(layer: nn.Module, x: Tensor, kernel: Tensor) -> Tensor:
    padding = layer.padding
    if layer.padding_mode != 'zeros':
        x = F.pad(x, _pads(layer), mode=layer.padding_mode)
        padding = (0,) * layer.num_dims
    return reference.dynamic_conv(x, kernel, layer.bias, layer.stride, padding, layer.dilation,
                                  layer.groups)


def _pads(layer: nn.Module) -> list[int]:
    """Positions to add on both sides of each dimension, the last one's first, as torch pads."""
    if isinstance(layer.padding, str):
        totals = [d * (k - 1) if layer.padding == 'same' else 0
                  for d, k in zip(layer.dilation, layer.kernel_size)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(p, p) for p in layer.padding]
    return [side for pair in reversed(sides) for side in pair]
