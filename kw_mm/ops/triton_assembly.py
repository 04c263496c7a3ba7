"""Kernel assembly in Triton: mixtures go from the product straight to their final places.

Compiled for GPUs and checked with Triton's interpreter; not run on a GPU yet.

A mixture is a row of alpha times the cells: few rows (samples times mixtures), very wide cells.
So programs divide the columns (a column is one element of a cell), every program takes all
rows, and the cells come from memory once. Neither the kernels nor their gradients are permuted:
with ``T`` positions, element ``(o, i, t)`` of sample s lies at

    s * stride_n + o * stride_o + i * stride_i + t * stride_p,

and that is a sum of what depends on the row (sample, position, output group, input group) and
of what depends on the column (element of the cell).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .triton_support import block, compute_dtype, dot_precision, register

# What varies from batch to batch and is not worth compiling again.
UNSPECIALIZED = ['num_rows', 'num_mixtures', 'out_groups', 'in_groups']

# Programs at least, where there is enough to do: two for each of the 132 processors of an H100.
NUM_PROGRAMS = 264


@triton.jit
def _row_places(rows, num_mixtures, out_groups, in_groups, c_out, c_in, stride_n, stride_o,
                stride_i, stride_p):
    """What a row contributes to an offset in the kernels."""
    mixtures = rows % num_mixtures
    positions = mixtures // (out_groups * in_groups)
    out_channels = mixtures // in_groups % out_groups * c_out
    in_channels = mixtures % in_groups * c_in
    # All kernels of a batch may have more than 2^31 elements; one has not.
    samples = (rows // num_mixtures).to(tl.int64)
    return (samples * stride_n + out_channels * stride_o + in_channels * stride_i
            + positions * stride_p)


@triton.jit
def _columns(column_block, run, positions, stride_o, stride_i, stride_p, ALIGNED: tl.constexpr,
             BLOCK_D: tl.constexpr):
    """A block's columns, and what they contribute to an offset in the kernels.

    ``run`` columns have the same output channel.
    """
    columns = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    within = columns % run
    places = (columns // run * stride_o + within // positions * stride_i
              + within % positions * stride_p)
    if ALIGNED:
        # Behind the remainder the compiler cannot see it, and would load and store single elements.
        places = tl.max_contiguous(tl.multiple_of(places, 16), 16)
    return columns, places


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _assemble_kernel(alpha_ptr, cells_ptr, kernel_ptr, num_rows, num_cells, num_columns,
                     num_mixtures, out_groups, in_groups, c_out, c_in, run, positions, stride_n,
                     stride_o, stride_i, stride_p, ACC: tl.constexpr, PRECISION: tl.constexpr,
                     ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                     BLOCK_D: tl.constexpr):
    """kernel[row, column] = sum_cell alpha[row, cell] cells[cell, column].

    Grid: blocks of columns, then programs that share the tiles of rows.
    """
    dtype = kernel_ptr.dtype.element_ty
    columns, column_places = _columns(tl.program_id(0), run, positions, stride_o, stride_i,
                                      stride_p, ALIGNED, BLOCK_D)
    # A second tile of rows reads the same cells, from the cache.
    for first_row in range(tl.program_id(1) * BLOCK_R, num_rows, tl.num_programs(1) * BLOCK_R):
        rows = first_row + tl.arange(0, BLOCK_R)
        total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
        for first_cell in range(0, num_cells, BLOCK_C):
            cells = first_cell + tl.arange(0, BLOCK_C)
            weights = tl.load(
                alpha_ptr + rows.to(tl.int64)[:, None] * num_cells + cells[None, :],
                mask=(rows < num_rows)[:, None] & (cells < num_cells)[None, :], other=0)
            elements = tl.load(
                cells_ptr + cells.to(tl.int64)[:, None] * num_columns + columns[None, :],
                mask=(cells < num_cells)[:, None] & (columns < num_columns)[None, :], other=0)
            total = tl.dot(weights.to(dtype), elements.to(dtype), total, input_precision=PRECISION,
                           out_dtype=ACC)
        row_places = _row_places(rows, num_mixtures, out_groups, in_groups, c_out, c_in, stride_n,
                                 stride_o, stride_i, stride_p)
        tl.store(kernel_ptr + row_places[:, None] + column_places[None, :], total.to(dtype),
                 mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _grad_cells_kernel(grad_ptr, alpha_ptr, cells_ptr, num_rows, num_cells, num_columns,
                       num_mixtures, out_groups, in_groups, c_out, c_in, run, positions, stride_n,
                       stride_o, stride_i, stride_p, ACC: tl.constexpr, PRECISION: tl.constexpr,
                       ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                       BLOCK_D: tl.constexpr):
    """cells[cell, column] = sum_row alpha[row, cell] grad[row, column].

    Grid: blocks of columns, then programs that share the tiles of cells.
    """
    dtype = grad_ptr.dtype.element_ty
    columns, column_places = _columns(tl.program_id(0), run, positions, stride_o, stride_i,
                                      stride_p, ALIGNED, BLOCK_D)
    for first_cell in range(tl.program_id(1) * BLOCK_C, num_cells, tl.num_programs(1) * BLOCK_C):
        cells = first_cell + tl.arange(0, BLOCK_C)
        total = tl.zeros((BLOCK_C, BLOCK_D), ACC)
        for first_row in range(0, num_rows, BLOCK_R):
            rows = first_row + tl.arange(0, BLOCK_R)
            weights = tl.load(
                alpha_ptr + rows.to(tl.int64)[None, :] * num_cells + cells[:, None],
                mask=(rows < num_rows)[None, :] & (cells < num_cells)[:, None], other=0)
            row_places = _row_places(rows, num_mixtures, out_groups, in_groups, c_out, c_in,
                                     stride_n, stride_o, stride_i, stride_p)
            grad = tl.load(
                grad_ptr + row_places[:, None] + column_places[None, :],
                mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0)
            total = tl.dot(weights.to(dtype), grad, total, input_precision=PRECISION,
                           out_dtype=ACC)
        tl.store(cells_ptr + cells.to(tl.int64)[:, None] * num_columns + columns[None, :],
                 total.to(cells_ptr.dtype.element_ty),
                 mask=(cells < num_cells)[:, None] & (columns < num_columns)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _grad_alpha_kernel(grad_ptr, cells_ptr, partial_ptr, num_rows, num_cells, num_columns,
                       num_mixtures, out_groups, in_groups, c_out, c_in, run, positions, stride_n,
                       stride_o, stride_i, stride_p, ACC: tl.constexpr, PRECISION: tl.constexpr,
                       ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                       BLOCK_D: tl.constexpr):
    """partial[split, row, cell] = sum of grad[row, column] cells[cell, column], over the
    split's columns.

    Grid: tiles of (rows, cells), then splits. Splits take blocks of columns in turn, and a
    block is read by all tiles at about the same time.
    """
    dtype = grad_ptr.dtype.element_ty
    cell_tiles = tl.cdiv(num_cells, BLOCK_C)
    rows = tl.program_id(0) // cell_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    cells = tl.program_id(0) % cell_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row_places = _row_places(rows, num_mixtures, out_groups, in_groups, c_out, c_in, stride_n,
                             stride_o, stride_i, stride_p)
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for column_block in range(tl.program_id(1), tl.cdiv(num_columns, BLOCK_D),
                              tl.num_programs(1)):
        columns, column_places = _columns(column_block, run, positions, stride_o, stride_i,
                                          stride_p, ALIGNED, BLOCK_D)
        grad = tl.load(grad_ptr + row_places[:, None] + column_places[None, :],
                       mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0)
        elements = tl.load(
            cells_ptr + cells.to(tl.int64)[None, :] * num_columns + columns[:, None],
            mask=(cells < num_cells)[None, :] & (columns < num_columns)[:, None], other=0)
        total = tl.dot(grad, elements.to(dtype), total, input_precision=PRECISION, out_dtype=ACC)
    places = (tl.program_id(1).to(tl.int64) * num_rows + rows)[:, None] * num_cells
    tl.store(partial_ptr + places + cells[None, :], total,
             mask=(rows < num_rows)[:, None] & (cells < num_cells)[None, :])


class _Layout(NamedTuple):
    """The kernels' integer arguments from ``num_rows`` on, in this order."""

    num_rows: int
    num_cells: int
    num_columns: int
    num_mixtures: int
    out_groups: int
    in_groups: int
    c_out: int
    c_in: int
    run: int
    positions: int
    stride_n: int
    stride_o: int
    stride_i: int
    stride_p: int

    @classmethod
    def of(cls, kernel: Tensor, cell_shape: Sequence[int], grid: Sequence[int]) -> _Layout:
        num_cells, c_out, c_in, *cell_kernel = cell_shape
        positions = math.prod(cell_kernel)
        num_mixtures = math.prod(grid)
        return cls(len(kernel) * num_mixtures, num_cells, c_out * c_in * positions, num_mixtures,
                   grid[1], grid[2], c_out, c_in, c_in * positions, positions,
                   *kernel.stride()[:3], _position_stride(kernel))

    def options(self, dtype: torch.dtype, block_r: int, block_c: int, block_d: int) -> dict:
        """The kernels' constant arguments, and how to launch them."""
        # Whether 16 columns, from a multiple of 16 on, lie side by side, at such a multiple.
        is_aligned = (self.positions == self.stride_i == 1 and self.run % 16 == 0
                      and self.stride_o % 16 == 0)
        return dict(
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            PRECISION=dot_precision(dtype), ALIGNED=is_aligned, BLOCK_R=block_r, BLOCK_C=block_c,
            BLOCK_D=block_d, num_warps=4, num_stages=2 if dtype == torch.float64 else 3)


def _position_stride(kernel: Tensor) -> int | None:
    """The step between neighbouring positions, row-major, or None if it varies."""
    stride, expected = 0, None
    for size, step in zip(reversed(kernel.shape[3:]), reversed(kernel.stride()[3:])):
        if size == 1:
            continue
        if expected is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return stride


def _new_kernel(alpha: Tensor, cell_shape: Sequence[int], grid: Sequence[int],
                kernel_size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty batch of kernels, in the memory format that convolutions read."""
    out_channels, in_channels = grid[1] * cell_shape[1], grid[2] * cell_shape[2]
    factory = dict(dtype=dtype, device=alpha.device)
    if len(kernel_size) == 2 and math.prod(kernel_size) > 1:
        kernel = torch.empty(len(alpha), out_channels, *kernel_size, in_channels, **factory)
        return kernel.permute(0, 1, 4, 2, 3)
    return torch.empty(len(alpha), out_channels, in_channels, *kernel_size, **factory)


def _blocks(dtype: torch.dtype, num_columns: int) -> tuple[int, int, int]:
    """At most this many rows or cells in an output tile, terms of a sum, and columns at a time.

    As many as registers hold: ptxas reports next to no spills, and larger tiles spill. Shared
    memory stays below 80 KB. Cells of few elements are cut finer, so that there are enough
    programs.
    """
    if dtype == torch.float64:
        return 32, 16, block(num_columns, 16, 64)
    columns = block(num_columns, 16, 128 if num_columns >= 128 * NUM_PROGRAMS else 64)
    return 64, 32 if dtype == torch.float32 else 64, columns


def _programs(tiles: int, others: int) -> int:
    """Programs to share tiles, beside ``others`` in the grid's other direction."""
    return max(min(tiles, NUM_PROGRAMS // max(others, 1)), 1)


def _assemble(alpha: Tensor, cells: Tensor, grid: Sequence[int], kernel_size: Sequence[int],
              dtype: torch.dtype) -> Tensor:
    kernel = _new_kernel(alpha, cells.shape, grid, kernel_size, dtype)
    if kernel.numel() == 0:
        return kernel
    layout = _Layout.of(kernel, cells.shape, grid)
    most, terms, block_d = _blocks(dtype, layout.num_columns)
    block_r, block_c = block(layout.num_rows, 16, most), block(layout.num_cells, 16, terms)
    column_blocks = triton.cdiv(layout.num_columns, block_d)
    programs = _programs(triton.cdiv(layout.num_rows, block_r), column_blocks)
    with torch.cuda.device_of(alpha):
        _assemble_kernel[column_blocks, programs](
            alpha.contiguous(), cells.contiguous(), kernel, *layout,
            **layout.options(dtype, block_r, block_c, block_d))
    return kernel


def _grad_cells(grad: Tensor, alpha: Tensor, cell_shape: Sequence[int], grid: Sequence[int],
                dtype: torch.dtype) -> Tensor:
    cells = torch.empty(cell_shape, dtype=dtype, device=grad.device)
    if grad.numel() == 0:
        return cells.zero_()
    layout = _Layout.of(grad, cell_shape, grid)
    most, terms, block_d = _blocks(grad.dtype, layout.num_columns)
    block_r, block_c = block(layout.num_rows, 16, terms), block(layout.num_cells, 16, most)
    column_blocks = triton.cdiv(layout.num_columns, block_d)
    programs = _programs(triton.cdiv(layout.num_cells, block_c), column_blocks)
    with torch.cuda.device_of(grad):
        _grad_cells_kernel[column_blocks, programs](
            grad, alpha.contiguous(), cells, *layout,
            **layout.options(grad.dtype, block_r, block_c, block_d))
    return cells


def _grad_alpha(grad: Tensor, cells: Tensor, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
    shape = (len(grad), math.prod(grid), len(cells))
    if grad.numel() == 0:
        return torch.empty(shape, dtype=dtype, device=grad.device)
    layout = _Layout.of(grad, cells.shape, grid)
    most, terms, _ = _blocks(grad.dtype, layout.num_columns)
    block_r, block_c = (block(layout.num_rows, 16, min(most, 64)),
                        block(layout.num_cells, 16, most))
    block_d = block(layout.num_columns, 16, terms)
    tiles = triton.cdiv(layout.num_rows, block_r) * triton.cdiv(layout.num_cells, block_c)
    # By shapes alone, and added up in a fixed order: the same bits every time.
    splits = _programs(triton.cdiv(layout.num_columns, block_d), tiles)
    partial = torch.empty(splits, *shape, device=grad.device,
                          dtype=torch.float64 if grad.dtype == torch.float64 else torch.float32)
    with torch.cuda.device_of(grad):
        _grad_alpha_kernel[tiles, splits](
            grad, cells.contiguous(), partial, *layout,
            **layout.options(grad.dtype, block_r, block_c, block_d))
    return (partial.sum(0) if splits > 1 else partial[0]).to(dtype)


register('assemble(Tensor alpha, Tensor cells, SymInt[] grid, SymInt[] kernel_size, '
         'ScalarType dtype) -> Tensor', _assemble,
         lambda alpha, cells, grid, kernel_size, dtype:
         _new_kernel(alpha, cells.shape, grid, kernel_size, dtype))
register('assemble_grad_cells(Tensor grad, Tensor alpha, SymInt[] cell_shape, SymInt[] grid, '
         'ScalarType dtype) -> Tensor', _grad_cells,
         lambda grad, alpha, cell_shape, grid, dtype: grad.new_empty(cell_shape, dtype=dtype))
register('assemble_grad_alpha(Tensor grad, Tensor cells, SymInt[] grid, ScalarType dtype) '
         '-> Tensor', _grad_alpha,
         lambda grad, cells, grid, dtype:
         grad.new_empty((len(grad), math.prod(grid), len(cells)), dtype=dtype))


class _AssembleKernel(torch.autograd.Function):
    """Autocast is dealt with before: the three operators are not subject to it."""

    @staticmethod
    def forward(ctx, alpha, cells, grid, kernel_size, dtype):
        ctx.save_for_backward(alpha, cells)
        ctx.grid = grid
        return torch.ops.kw_mm.assemble(alpha, cells, grid, kernel_size, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        alpha, cells = ctx.saved_tensors
        if _position_stride(grad) is None:
            grad = grad.contiguous()
        grad_alpha = grad_cells = None
        if ctx.needs_input_grad[0]:
            grad_alpha = torch.ops.kw_mm.assemble_grad_alpha(grad, cells, ctx.grid, alpha.dtype)
        if ctx.needs_input_grad[1]:
            grad_cells = torch.ops.kw_mm.assemble_grad_cells(grad, alpha, cells.shape, ctx.grid,
                                                             cells.dtype)
        return grad_alpha, grad_cells, None, None, None


def assemble_kernel(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                    kernel_size: Sequence[int]) -> Tensor:
    """Mixes cells and writes the mixtures straight to their places; see ``reference``.

    Sums are in float32 (float64 for float64); float32 factors are rounded to TF32 where torch's
    own products would round them. Under autocast the kernels have its dtype, as a product
    would; the gradients have the dtypes of ``alpha`` and ``cells``, and those of float32 cells
    are not rounded on the way. Equal inputs give equal bits.

    Args:
        alpha: ``(N, m, n)``; N may be 0.
        cells: ``(n, c_out, c_in, *k)``, 1 to 3 dimensions, with fewer than 2^31 elements in
            each cell.
        grid: ``(S, OG, IG)``.
        kernel_size: Of the kernel.

    Returns:
        Kernels ``(N, OG * c_out, IG * c_in, *kernel_size)``. Those of 2 dimensions and more than
        one position are channels-last in memory (input channels next to each other), all others
        row-major.

    Raises:
        ValueError: If the dtypes of ``alpha`` and ``cells`` differ without autocast.
    """
    dtype = compute_dtype(alpha=alpha, cells=cells)
    return _AssembleKernel.apply(alpha, cells, tuple(grid), tuple(kernel_size), dtype)
