"""From mixing weights and cells to one kernel per sample."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backend import takes_cpu_products, takes_triton
from .cell_gradients import collector_of, leave_factors
from .cell_storage import MIN_CELLS, stored_by_rows
from .cpu_products import MIN_WIDTH, mix_blocks, sum_products

# A product of few rows and a very wide matrix runs at a fraction of a CPU's rate. Cut into blocks
# of at least so many columns it is a batch of products that stay in the cache, 2 to 4 times as
# fast. Smaller cells are not worth it.
BLOCK_WIDTH = 512
MIN_BLOCKED_SIZE = 2**14
# A kernel in blocks has to be copied into place. Where a single product is the kernel as it comes,
# blocks pay as long as cells outnumber the product's rows by this.
ROWS_TO_CELLS = 4
# Columns summed over at a time by the gradient of the mixing weights, whose few results would
# otherwise leave all threads but one idle.
SUM_WIDTH = 2**14


def assemble_kernel(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                    kernel_size: Sequence[int]) -> Tensor:
    """Mixes cells in blocks of their rows and puts the mixtures in place with one copy; see
    ``reference``.

    Cells that ``collect_gradients`` returned get the gradient of all their uses at once.
    """
    if takes_triton(alpha, cells):
        from .triton_assembly import assemble_kernel as in_triton
        return in_triton(alpha, cells, grid, kernel_size)
    collector = collector_of(cells)
    if collector is not None:
        return _AssembleCollected.apply(alpha.to(cells.dtype), cells, collector, grid, kernel_size)
    return _assemble(alpha, cells, grid, kernel_size)


def cut_kernel(kernel: Tensor, grid: Sequence[int], cell_shape: Sequence[int]) -> Tensor:
    """Cuts kernels into their mixtures, the inverse of ``assemble_kernel``; a view.

    Args:
        kernel: ``(N, out, in / groups, *k)``.
        grid: ``(S, OG, IG)``, positions and groups of cells that tile the kernel.
        cell_shape: ``(c_out, c_in, *k)``.

    Returns:
        ``(N, S, OG, IG, c_out, c_in, prod(k of a cell))``.
    """
    num_positions, num_out_groups, num_in_groups = grid
    c_out, c_in, *cell_kernel = cell_shape
    # Either the positions or the cells' own extent is 1.
    pieces = kernel.reshape(len(kernel), num_out_groups, c_out, num_in_groups, c_in, num_positions,
                            math.prod(cell_kernel))
    return pieces.permute(0, 5, 1, 3, 2, 4, 6)


def mix_cells(alpha: Tensor, cells: Tensor, fits: bool = False,
              make_out: Callable[..., Tensor | None] | None = None) -> Tensor:
    """Mixtures as they come, before they are put in place.

    Args:
        alpha: ``(N, m, n)``.
        cells: ``(n, c_out, c_in, *k)``.
        fits: Whether mixtures one after the other, as a single product has them, are the kernel.
        make_out: Gives memory for a result of a shape, if it has any.

    Returns:
        ``(N, m, blocks, rows, c_in, prod(k))``, a view; the rows of all blocks are ``c_out``.
    """
    c_out, c_in = cells.shape[1:3]
    alphas = alpha.flatten(0, 1)
    rows = c_out if _takes_one_product(cells, len(alphas), fits) else _rows_per_block(cells)
    blocks = cells.reshape(len(cells), c_out // rows, -1).transpose(0, 1)
    out = make_out and make_out((len(blocks), len(alphas), blocks.shape[2]))
    blocks = batch_product(alphas, blocks, out)
    return blocks.view(c_out // rows, *alpha.shape[:2], rows, c_in,
                       math.prod(cells.shape[3:])).permute(1, 2, 0, 3, 4, 5)


def mix_in_place(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                 make_out: Callable[..., Tensor | None] | None = None,
                 scale: Tensor | None = None) -> Tensor:
    """Mixtures of cells written where the kernel has them, for what ``mixes_in_place`` accepts.

    Args:
        alpha: ``(N, m, n)``.
        cells: ``(n, c_out, c_in, *k)``.
        grid: ``(S, OG, IG)``, positions and groups of cells that tile the kernel.
        make_out: Gives memory for a result of a shape, if it has any.
        scale: Factors of the kernel's output channels, ``(OG * c_out,)``, or None for 1.

    Returns:
        ``(N, OG * c_out, prod(k), IG * c_in)`` with k the kernel's; a view. Where several cells
        are its positions, it is contiguous.
    """
    c_out, c_in = cells.shape[1:3]
    positions = math.prod(cells.shape[3:])
    num_samples, (num_positions, num_out_groups, num_in_groups) = len(alpha), grid
    shape = (num_samples, num_out_groups, c_out, num_positions, num_in_groups, c_in * positions)
    out = make_out and make_out(shape)
    out = alpha.new_empty(shape) if out is None else out
    # (c_out, N, S, OG, IG, width), in the order of alpha but for the rows of a cell.
    places, blocks, scales = out.permute(2, 0, 3, 1, 4, 5), cells.flatten(2).transpose(0, 1), None
    if scale is not None:
        scales = scale.view(1, 1, num_out_groups, c_out, 1).permute(3, 0, 1, 2, 4).expand(
            places.shape[:-1])
    elif num_positions == num_in_groups == 1 and not stored_by_rows(cells):
        places, blocks = out.flatten(2).unsqueeze(0), cells.flatten(1).unsqueeze(0)
    mix_blocks(alpha.flatten(0, 1), blocks, places, scales=scales)
    if positions == 1:
        return out.view(num_samples, num_out_groups * c_out, num_positions, num_in_groups * c_in)
    return out.view(num_samples, num_out_groups * c_out, num_in_groups * c_in,
                    positions).transpose(2, 3)


def mixes_in_place(alpha: Tensor, cells: Tensor, grid: Sequence[int]) -> bool:
    """Whether ``mix_in_place`` is the way for such tensors."""
    # Of few cells it takes longest to write mixtures, whose positions may have to be moved again.
    is_short = grid[0] > 1 and len(cells) < MIN_CELLS
    return (math.prod(cells.shape[2:]) >= MIN_WIDTH and not is_short
            and takes_cpu_products(alpha, cells))


def positions_last(kernel: Tensor, kernel_size: Sequence[int]) -> Tensor:
    """Kernels ``(N, C_out, prod(k), C_in)`` indexed ``(N, C_out, C_in, *k)``, a view."""
    kernel = kernel.transpose(2, 3)
    if 1 in kernel.shape[2:]:
        # Of one order only, which strides of lengths 1 must not hide.
        return kernel.reshape(*kernel.shape[:3], *kernel_size)
    return kernel.unflatten(3, kernel_size)


def _assemble(alpha: Tensor, cells: Tensor, grid: Sequence[int], kernel_size: Sequence[int],
              by_rows: Tensor | None = None) -> Tensor:
    if mixes_in_place(alpha, cells, grid):
        return positions_last(mix_in_place(alpha, cells, grid), kernel_size)
    fits = grid[0] == grid[2] == 1
    if by_rows is not None and not _takes_one_product(cells, len(alpha) * alpha.shape[1], fits):
        cells = by_rows
    # (N, S, OG, IG, blocks, rows, c_in, k); as in cut_kernel, (S, k) flattens to the kernel.
    mixtures = mix_cells(alpha, cells, fits).unflatten(1, grid)
    return mixtures.permute(0, 2, 4, 5, 3, 6, 1, 7).reshape(
        len(alpha), grid[1] * cells.shape[1], grid[2] * cells.shape[2], *kernel_size)


class _AssembleCollected(torch.autograd.Function):
    """``_assemble`` that leaves the gradient of the cells to their collector."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, cells: Tensor, collector: Any, grid: Sequence[int],
                kernel_size: Sequence[int]) -> Tensor:
        ctx.save_for_backward(alpha, cells)
        # Activation checkpointing lets go of what is saved, and the next layer would find no
        # collector and make one of its own, with a copy of all cells.
        ctx.held = cells
        ctx.collector = collector
        ctx.grid = grid
        collector.num_rows += len(alpha) * alpha.shape[1]
        return _assemble(alpha, cells, grid, kernel_size, collector.rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        alpha, cells = ctx.saved_tensors
        ctx.held = None
        grad = leave_factors(ctx.collector, alpha.flatten(0, 1),
                             cut_kernel(grad, ctx.grid, cells.shape[1:]))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return _sum_products(grad, cells).view(alpha.shape), None, None, None, None


def batch_product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """``(R, n)``, or ``(B, R, n)``, times each of ``(B, n, width)``: ``(B, R, width)``."""
    if len(right) == 1:
        return torch.matmul(left.flatten(0, -2), right[0], out=None if out is None else out[0]
                            ).unsqueeze(0)
    return torch.bmm(left.expand(len(right), -1, -1), right, out=out)


def _sum_products(grads: Tensor, cells: Tensor) -> Tensor:
    """``grads @ cells.T``, few results of very long sums: ``(R, D)`` and cells to ``(R, n)``."""
    if takes_cpu_products(grads, cells):
        return sum_products(grads, cells.flatten(1))
    if grads.device.type != 'cpu' or grads.shape[1] % SUM_WIDTH:
        return grads @ cells.flatten(1).T
    num_parts = grads.shape[1] // SUM_WIDTH
    grads, cells = (t.reshape(len(t), num_parts, SUM_WIDTH).transpose(0, 1)
                    for t in (grads, cells))
    return (grads @ cells.transpose(1, 2)).sum(0)


def _takes_one_product(cells: Tensor, num_rows: int, fits: bool) -> bool:
    """Whether blocks would not pay for a product of so many rows with cells."""
    # On a GPU one product does; on the meta device it is the one that tools count.
    if cells.device.type != 'cpu' or math.prod(cells.shape[1:]) < MIN_BLOCKED_SIZE:
        return True
    if stored_by_rows(cells):
        return False
    # Writing mixtures then takes longer than reading cells, and a single product may fit.
    return len(cells) < MIN_CELLS or (fits and len(cells) < ROWS_TO_CELLS * num_rows)


def _rows_per_block(cells: Tensor) -> int:
    c_out, width = cells.shape[1], math.prod(cells.shape[2:])
    if stored_by_rows(cells):
        return 1
    return next(rows for rows in range(1, c_out + 1)
                if c_out % rows == 0 and (rows * width >= BLOCK_WIDTH or rows == c_out))
