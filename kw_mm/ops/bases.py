"""Kernels for inference, from a few kernels computed once.

Before normalisation, the logits are linear in the hidden vector h of the attention, and so is the
kernel that is mixed with them:

    z_i = W_i h + b_i
    w_i = sum_j z_ij e_j / (|z_i|_1 + EPS) = (sum_k h_k B_ki + B_0i) / (|z_i|_1 + EPS)
    with B_ki = sum_j W_ijk e_j and B_0i = sum_j b_ij e_j

The *bases* B do not depend on the image. They replace n cells by hidden + 1 kernels of the layer,
and those of hidden units at zero, after the ReLU about half, need not even be read.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import operators
from .assembly import assemble_kernel


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
        kernel in the order (output channel, position, group of input channels).
    """
    # A basis is a kernel, mixed with the part of the logits that one hidden unit contributes.
    rows = torch.cat((weight, bias.unsqueeze(-1)), -1).permute(2, 0, 1)
    cells = cells.flatten(3)
    kernels = assemble_kernel(rows, cells, grid, (grid[0] * cells.shape[3],), scale)
    # (hidden + 1, C_out, IG, c_in, positions) to (C_out, positions, IG, hidden + 1, c_in)
    kernels = kernels.unflatten(2, (grid[2], -1)).permute(1, 4, 2, 0, 3)
    return kernels.reshape(-1, len(rows), cells.shape[2]).contiguous()


def mix_bases(hidden: Tensor, logits: Tensor, bases: Tensor, grid: Sequence[int],
              kernel_shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """The kernels of a batch.

    Args:
        hidden: h, not negative, ``(N, hidden)``.
        logits: z, ``(N, m, n + 1)``.
        bases: ``(B, hidden + 1, width)``.
        grid: ``(S, OG, IG)``.
        kernel_shape: ``(C_out, C_in / groups, *k)``.
        dtype: Of the kernels, by default the bases'.

    Returns:
        ``(N, *kernel_shape)``.
    """
    return operators.mix_bases(hidden, logits, bases, grid, kernel_shape, dtype or bases.dtype)
