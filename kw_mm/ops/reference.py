"""KernelWarehouse as the method describes it, with slow loops.

Each function has a fast twin with the same signature elsewhere in ``kw_mm.ops``; tests compare the
two. Symbols: N samples, m mixtures, n cells.
"""
from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-3  # in the L1 normalisation (method, section 3)


def mean_positions(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Averages ``(N, C, *spatial)`` over positions: ``(N, C)`` (method, section 3).

    Args:
        x: The input of a layer.
        dtype: Of the result; by default that of ``x``.
    """
    positions: list[Any] = list(itertools.product(*map(range, x.shape[2:])))
    total: Any = sum(x[(..., *position)] for position in positions)
    return (total / len(positions)).to(dtype or x.dtype)


def mixing_weights(logits: Tensor, beta: Tensor, tau: Tensor) -> Tensor:
    """``alpha_ij = (1 - tau) z_ij / (sum_p |z_ip| + 1e-3) + tau beta_ij`` (method, section 3).

    Args:
        logits: z, ``(N, m, n + 1)``; the last column is the zero cell's.
        beta: The initial assignment, ``(m, n)`` of 0 and 1, without the zero cell's column, which
            is dropped in the end.
        tau: Temperature in [0, 1], 0-dimensional.

    Returns:
        alpha, ``(N, m, n)``.
    """
    num_samples, num_mixtures, num_columns = logits.shape
    samples = []
    for sample in range(num_samples):
        rows = []
        for i in range(num_mixtures):
            total = sum(logits[sample, i, p].abs() for p in range(num_columns))
            row = [(1 - tau) * logits[sample, i, j] / (total + EPS) + tau * beta[i, j]
                   for j in range(num_columns - 1)]
            rows.append(torch.stack(row))
        samples.append(torch.stack(rows))
    if not samples:
        return logits[..., :-1]
    return torch.stack(samples).to(logits.dtype)


def logit_norms(logits: Tensor) -> Tensor:
    """``sum_p |z_ip| + 1e-3`` of logits ``(N, m, n + 1)``: ``(N, m)`` (method, section 3)."""
    total: Any = sum(logits[..., p].abs() for p in range(logits.shape[-1]))
    return total + EPS


def basis_logits(rows: Tensor, fc3: Tensor, bias: Tensor, first_cell: int) -> Tensor:
    """Logits through a non-local basis (method, section 3).

    Args:
        rows: ``(N, m, local + basis + 1)``: each mixture's logits of the layer's own cells, its
            basis coefficients and its logit of the zero cell.
        fc3: ``(nonlocal, basis)``: maps the basis to the cells of other layers.
        bias: ``(m * (n + 1),)`` with n = local + nonlocal, added in the end.
        first_cell: Index of the layer's first own cell.

    Returns:
        z, ``(N, m, n + 1)``.
    """
    num_samples, num_mixtures, width = rows.shape
    num_nonlocal, num_basis = fc3.shape
    num_local = width - num_basis - 1
    bias = bias.view(num_mixtures, num_local + num_nonlocal + 1)
    samples = []
    for sample in range(num_samples):
        mixtures = []
        for i in range(num_mixtures):
            row = rows[sample, i]
            own, basis, zero = row[:num_local], row[num_local:-1], row[-1:]
            others = torch.stack([(fc3[p] * basis).sum() for p in range(num_nonlocal)])
            mixtures.append(
                torch.cat((others[:first_cell], own, others[first_cell:], zero)) + bias[i])
        samples.append(torch.stack(mixtures))
    if not samples:
        return rows.new_zeros(0, num_mixtures, num_local + num_nonlocal + 1)
    return torch.stack(samples)


def assemble_kernel(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                    kernel_size: Sequence[int]) -> Tensor:
    """``w_i = sum_j alpha_ij e_j``, arranged to a kernel (method, section 4).

    Args:
        alpha: ``(N, m, n)``; rows ordered (position, output group, input group).
        cells: ``(n, c_out, c_in, *k)``.
        grid: ``(S, OG, IG)``, positions and groups of cells that tile the kernel, S row-major
            over the kernel.
        kernel_size: Of the kernel. With S > 1 cells are 1x1, with S = 1 they have this size.

    Returns:
        Kernels, ``(N, OG * c_out, IG * c_in, *kernel_size)``.
    """
    _, num_out_groups, num_in_groups = grid
    c_out, c_in, *cell_kernel = cells.shape[1:]
    kernel = alpha.new_zeros(len(alpha), num_out_groups * c_out, num_in_groups * c_in,
                             *kernel_size)
    corners = itertools.product(*(range(0, k, c) for k, c in zip(kernel_size, cell_kernel)))
    places = itertools.product(corners, range(num_out_groups), range(num_in_groups))
    for i, (corner, out_group, in_group) in enumerate(places):
        place = (slice(None),
                 slice(out_group * c_out, (out_group + 1) * c_out),
                 slice(in_group * c_in, (in_group + 1) * c_in),
                 *(slice(at, at + size) for at, size in zip(corner, cell_kernel)))
        for j, cell in enumerate(cells):
            weight = alpha[:, i, j].view(-1, *(1,) * cell.dim())
            kernel[place] = kernel[place] + weight * cell
    return kernel


def dynamic_conv(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Sequence[int],
                 padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> Tensor:
    """Convolves each sample with its own kernel (method, section 4).

    Args:
        x: ``(N, C_in, *spatial)``, 1 to 3 spatial dimensions.
        kernel: ``(N, C_out, C_in / groups, *k)``.
        bias: ``(C_out,)`` or None, the same for all samples.
        stride: One entry for each spatial dimension, as ``dilation`` and ``padding``.
        padding: Zeros on both sides, or ``'same'`` or ``'valid'``.
        dilation: Spacing of the kernel's positions.
        groups: Convolution groups.

    Returns:
        ``(N, C_out, *spatial)``.
    """
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    if len(x) == 0:
        return conv(x, kernel.sum(0), bias, stride, padding, dilation, groups)
    return torch.cat([conv(x[i:i + 1], kernel[i], bias, stride, padding, dilation, groups)
                      for i in range(len(x))])
