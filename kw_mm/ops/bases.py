"""Kernels for inference, from a few kernels computed once.

Without their normalisation the logits are linear in the hidden vector h of the attention, and so
is everything that comes of them up to the kernel:

    z_i = W_i h + b_i
    w_i = sum_j z_ij e_j / (|z_i|_1 + EPS) = (sum_k h_k B_ki + B_0i) / (|z_i|_1 + EPS)
    with B_ki = sum_j W_ijk e_j and B_0i = sum_j b_ij e_j

The *bases* B do not depend on the image. They replace n cells by hidden + 1 kernels of the layer,
and those of hidden units at zero, after the ReLU about half, need not even be read.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .assembly import batch_product, mix_cells
from .backend import takes_cpu_products
from .cpu_products import mix_blocks


def contract_bases(weight: Tensor, bias: Tensor, cells: Tensor, grid: Sequence[int],
                   scale: Tensor | None = None) -> Tensor:
    """Computes the bases, cut into blocks that belong to one mixture each.

    Args:
        weight: W without the zero cell's column, ``(m, n, hidden)``.
        bias: b likewise, ``(m, n)``.
        cells: ``(n, c_out, c_in, *k)``.
        grid: ``(S, OG, IG)``, positions and groups of cells that tile the kernel; their product
            is m.
        scale: Factors of the kernel's output channels, ``(OG * c_out,)``, or None for 1.

    Returns:
        ``(B, hidden + 1, width)``, the last of the hidden + 1 being B_0. The B blocks are the
        kernel in the order (output channel, position, input channel); ``block_mixtures`` tells
        whose they are.
    """
    rows = torch.cat((weight, bias.unsqueeze(-1)), -1).permute(2, 0, 1)
    # (hidden + 1, S, OG, IG, c_out, c_in, k); either S or k is 1.
    bases = mix_cells(rows, cells).flatten(2, 3).unflatten(1, grid)
    if scale is not None:
        bases = bases * scale.view(grid[1], 1, -1, 1, 1)
    # (OG, c_out, S, k, IG, hidden + 1, c_in)
    bases = bases.permute(2, 4, 1, 6, 3, 0, 5).reshape(-1, len(rows), cells.shape[2])
    return bases.contiguous()


def block_mixtures(grid: Sequence[int], cell_shape: Sequence[int]) -> Tensor:
    """The mixture that each block of ``contract_bases`` belongs to, ``(B,)``."""
    num_positions, num_out_groups, num_in_groups = grid
    c_out, _, *cell_kernel = cell_shape
    mixtures = torch.arange(math.prod(grid)).view(*grid).permute(1, 0, 2)
    size = (num_out_groups, c_out, num_positions, math.prod(cell_kernel), num_in_groups)
    return mixtures[:, None, :, None].expand(size).flatten()


def mix_bases(hidden: Tensor, norms: Tensor, bases: Tensor, mixtures: Tensor,
              make_out: Callable[..., Tensor | None] | None = None) -> Tensor:
    """The kernels of a batch.

    Args:
        hidden: h, not negative, ``(N, hidden)``.
        norms: ``|z_i|_1 + EPS``, ``(N, m)``.
        bases: ``(B, hidden + 1, width)``.
        mixtures: ``(B,)``.
        make_out: Gives memory for a result of a shape, if it has any.

    Returns:
        ``(N, B, width)``, any strides.
    """
    hidden = torch.cat((hidden, hidden.new_ones(len(hidden), 1)), 1)
    scales = (1 / norms)[:, mixtures]
    if takes_cpu_products(hidden, scales, bases):
        shape = len(hidden), len(bases), bases.shape[2]
        out = make_out and make_out(shape)
        out = bases.new_empty(shape) if out is None else out
        # Of one sample the bases of active units alone are read.
        active = hidden[0].nonzero().squeeze(1) if len(hidden) == 1 else None
        mix_blocks((hidden if active is None else hidden[:, active]).expand(
            len(bases), -1, -1), bases, out.transpose(0, 1), active, scales.T)
        return out
    # How many units are active is nothing that a compiler knows.
    if len(hidden) == 1 and bases.device.type == 'cpu' and not torch.compiler.is_compiling():
        return _sum_active(hidden[0], scales[0], bases).unsqueeze(0)
    # Few rows and a wide matrix, as in assembly, in blocks from the outset.
    out = make_out and make_out((len(bases), len(hidden), bases.shape[2]))
    return batch_product(scales.T.unsqueeze(-1) * hidden, bases, out).transpose(0, 1)


def _sum_active(hidden: Tensor, scales: Tensor, bases: Tensor) -> Tensor:
    """One sample: reads the bases of active units alone."""
    num_blocks, num_bases, width = bases.shape
    active = hidden.nonzero().squeeze(1)
    starts = torch.arange(0, num_blocks * num_bases, num_bases)
    return F.embedding_bag(
        starts.unsqueeze(1) + active, bases.flatten(0, 1), mode='sum',
        # Of another dtype under autocast.
        per_sample_weights=(scales.unsqueeze(1) * hidden[active]).to(bases.dtype))
