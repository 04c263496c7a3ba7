"""Mixes cells to one kernel per sample."""
from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch, operators
from .attention import mixing_weights
from .autocast import product_dtype
from .cell_gradients import assemble_collected, is_collected


def assemble_kernel(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                    kernel_size: Sequence[int], scale: Tensor | None = None,
                    dtype: torch.dtype | None = None) -> Tensor:
    """Mixes cells to kernels; see ``reference``.

    Cells that ``collect_gradients`` returned get the gradient of all their uses at once.

    Args:
        alpha: ``(N, m, n)``.
        cells: ``(n, c_out, c_in, *k)``.
        grid: ``(S, OG, IG)``.
        kernel_size: Of the kernel.
        scale: Factors of the kernel's output channels, ``(OG * c_out,)``, or None for 1.
        dtype: Of the kernels; by default the cells', or autocast's where that is on.

    Returns:
        Kernels, ``(N, OG * c_out, IG * c_in, *kernel_size)``.
    """
    if scale is None and dtype is None and is_collected(cells):
        return assemble_collected(alpha, cells, grid, kernel_size)
    dtype = product_dtype(cells) if dtype is None else dtype
    return operators.assemble(alpha, _for_all_layers(cells, dtype), grid, kernel_size, scale, dtype)


def assemble_logits(logits: Tensor, beta: Tensor | None, tau: Tensor | None, cells: Tensor,
                    grid: Sequence[int], kernel_size: Sequence[int], scale: Tensor | None = None,
                    dtype: torch.dtype | None = None) -> Tensor:
    """``assemble_kernel`` of ``mixing_weights``, in one operator: fewer kernels for a GPU to start.

    Args:
        logits: ``(N, m, n + 1)``.
        beta: The assignment ``(m, n)``, or None, as tau, for a temperature of 0.
        tau: The temperature, 0-dimensional.
        cells: As ``assemble_kernel`` takes them, and all that follow.
        grid: ``(S, OG, IG)``.
        kernel_size: Of the kernel.
        scale: Factors of the kernel's output channels, ``(OG * c_out,)``, or None for 1.
        dtype: Of the kernels; by default the cells', or autocast's where that is on.

    Returns:
        Kernels, ``(N, OG * c_out, IG * c_in, *kernel_size)``.
    """
    if is_collected(cells):
        return assemble_kernel(mixing_weights(logits, beta, tau), cells, grid, kernel_size, scale,
                               dtype)
    dtype = product_dtype(cells) if dtype is None else dtype
    return operators.assemble_logits(logits, beta, tau, _for_all_layers(cells, dtype), grid,
                                     kernel_size, scale, dtype)


def _for_all_layers(cells: Tensor, dtype: torch.dtype) -> Tensor:
    """Cells in the precision of their mixtures, if that is narrower and a compiler is reading.

    It converts them once for all layers of a warehouse. Inside of an operator it would not see that
    they do the same.
    """
    narrows = dispatch.is_compiling() and cells.dtype.itemsize > dtype.itemsize
    return cells.to(dtype) if narrows else cells
