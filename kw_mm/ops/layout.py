"""Converts between kernels and their pieces without copying."""
from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .cell_storage import MIN_CELLS


def cut_kernel(kernel: Tensor, grid: Sequence[int], cell_shape: Sequence[int]) -> Tensor:
    """Cuts kernels into mixtures, the inverse of how ``assemble_kernel`` arranges them.

    Args:
        kernel: ``(N, out, in / groups, *k)``.
        grid: ``(S, OG, IG)``, positions and groups of cells that tile the kernel.
        cell_shape: ``(c_out, c_in, *k)``.

    Returns:
        ``(N, S, OG, IG, c_out, c_in, prod(k of a cell))``; a view wherever the kernel's positions
        can be counted with one stride.
    """
    num_positions, num_out_groups, num_in_groups = grid
    c_out, c_in, *cell_kernel = cell_shape
    # Either the positions or the cells' own extent is 1.
    pieces = kernel.reshape(kernel.shape[0], num_out_groups, c_out, num_in_groups, c_in,
                            num_positions, math.prod(cell_kernel))
    return pieces.permute(0, 5, 1, 3, 2, 4, 6)


def memory_shape(num_samples: int, grid: Sequence[int],
                 cells_shape: Sequence[int]) -> tuple[int, ...]:
    """The order in which kernels lie in memory.

    Args:
        num_samples: Kernels, N.
        grid: ``(S, OG, IG)``.
        cells_shape: ``(n, c_out, c_in, *k)``.

    Returns:
        ``(N, out, positions, in / groups)`` if cells are single positions: mixtures then come in
        this order, and channels-last convolutions read it. Otherwise, and with so few cells that
        reordering costs little, ``(N, out, in / groups, positions)``.
    """
    num_positions, num_out_groups, num_in_groups = grid
    c_out, c_in, *cell_kernel = cells_shape[1:]
    out_channels, in_channels = num_out_groups * c_out, num_in_groups * c_in
    if has_positions_last(grid, cells_shape):
        return num_samples, out_channels, num_positions, in_channels
    return num_samples, out_channels, in_channels, num_positions * math.prod(cell_kernel)


def has_positions_last(grid: Sequence[int], cells_shape: Sequence[int]) -> bool:
    """Whether kernels are stored position before input channel."""
    return grid[0] > 1 and cells_shape[0] >= MIN_CELLS


def view_as_kernel(memory: Tensor, grid: Sequence[int], cells_shape: Sequence[int],
                   kernel_size: Sequence[int]) -> Tensor:
    """Kernels ``(N, out, in / groups, *k)`` in memory of ``memory_shape``."""
    if has_positions_last(grid, cells_shape):
        return positions_last(memory, kernel_size)
    return memory.view(*memory.shape[:3], *kernel_size)


def block_shape(grid: Sequence[int], kernel_shape: Sequence[int]) -> tuple[int, ...]:
    """The blocks of kernels ``(C_out, C_in, *k)`` that belong to one mixture each.

    Returns:
        ``(OG, c_out, S, positions of a cell, IG)``, in the order of memory with positions last.
    """
    num_positions, num_out_groups, num_in_groups = grid
    out_channels, _, *kernel_size = kernel_shape
    return (num_out_groups, out_channels // num_out_groups, num_positions,
            math.prod(kernel_size) // num_positions, num_in_groups)


def positions_last(memory: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Kernels ``(N, out, in / groups, *k)`` in memory ``(N, out, prod(k), in / groups)``."""
    if 1 in memory.shape[2:]:
        # Both orders are the same. Convolutions recognise plain strides as contiguous.
        return memory.view(*memory.shape[:2], memory.shape[3], *kernel_size)
    return memory.view(*memory.shape[:2], *kernel_size, memory.shape[3]).movedim(-1, 2)
