"""Kernel assembly in Triton: products write mixtures directly to their final places.

``cuda`` calls these instead of torch's products. Tests compile them for GPUs and run them in
Triton's interpreter; on a GPU they have run, but were not compared with the method.

A mixture is a row of alpha times the cells: few rows (samples times mixtures), very wide cells. So
the columns (a column is one element of a cell) are divided between programs, every program takes
all rows, and cells are read once. Kernels and their gradients are not permuted: cut to pieces they
have seven dimensions with any strides. The offset of an element is the sum of a part that depends
on the row (sample, position, output group, input group) and a part that depends on the column
(element of the cell).
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .layout import block_shape, cut_kernel, memory_shape, positions_last, view_as_kernel
from .triton_support import block, dot_precision

# Arguments that vary between batches, for which kernels are not compiled again.
UNSPECIALIZED = ['num_rows', 'num_mixtures', 'out_groups', 'in_groups']

_EPS = tl.constexpr(reference.EPS)

# Programs at least, where there is enough to do: two for each of the 132 processors of an H100.
NUM_PROGRAMS = 264


@triton.jit
def _row_places(rows, num_mixtures, out_groups, in_groups, stride_n, stride_s, stride_og,
                stride_ig):
    """The part of offsets in the kernels that depends on the row; it may exceed 2^31."""
    mixtures = rows % num_mixtures
    return ((rows // num_mixtures).to(tl.int64) * stride_n
            + (mixtures // (out_groups * in_groups)).to(tl.int64) * stride_s
            + (mixtures // in_groups % out_groups).to(tl.int64) * stride_og
            + (mixtures % in_groups).to(tl.int64) * stride_ig)


@triton.jit
def _columns(column_block, run, positions, stride_o, stride_i, stride_p, ALIGNED: tl.constexpr,
             BLOCK_D: tl.constexpr):
    """A block's columns, and the part of offsets in the kernels that depends on them.

    ``run`` columns have the same output channel.
    """
    columns = column_block * BLOCK_D + tl.arange(0, BLOCK_D)
    within = columns % run
    places = ((columns // run).to(tl.int64) * stride_o
              + (within // positions).to(tl.int64) * stride_i
              + (within % positions).to(tl.int64) * stride_p)
    if ALIGNED:
        # After a remainder the compiler cannot see this, and would load and store single elements.
        places = tl.max_contiguous(tl.multiple_of(places, 16), 16)
    return columns, places


@triton.jit
def _norms(logits_ptr, places, is_row, num_logits, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """L1 norms of rows of logits that begin at some places, and EPS."""
    total = tl.sum(tl.zeros((places.shape[0], BLOCK_C), ACC), 1)
    for first in range(0, num_logits, BLOCK_C):
        columns = first + tl.arange(0, BLOCK_C)
        z = tl.load(logits_ptr + places[:, None] + columns[None, :],
                    mask=is_row[:, None] & (columns < num_logits)[None, :], other=0)
        total += tl.sum(tl.abs(z.to(ACC)), 1)
    return total + _EPS


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _assemble_kernel(alpha_ptr, beta_ptr, tau_ptr, cells_ptr, scale_ptr, kernel_ptr, num_rows,
                     num_cells, num_columns, num_mixtures, out_groups, in_groups, run, positions,
                     stride_n, stride_s, stride_og, stride_ig, stride_o, stride_i, stride_p,
                     ARE_LOGITS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
                     ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
                     BLOCK_D: tl.constexpr):
    """kernel[row, column] = scale[channel] sum_cell alpha[row, cell] cells[cell, column].

    With ``ARE_LOGITS`` alpha is what mixing weights are made of: each program reads its rows twice,
    first for their norms; they are few beside the cells.

    Grid: blocks of columns, then programs that share the tiles of rows.
    """
    dtype = kernel_ptr.dtype.element_ty
    columns, column_places = _columns(tl.program_id(0), run, positions, stride_o, stride_i,
                                      stride_p, ALIGNED, BLOCK_D)
    # A second tile of rows reads the same cells, from the cache.
    for first_row in range(tl.program_id(1) * BLOCK_R, num_rows, tl.num_programs(1) * BLOCK_R):
        rows = first_row + tl.arange(0, BLOCK_R)
        # Logits have one more column, the zero cell's.
        alpha_places = rows.to(tl.int64) * (num_cells + (1 if ARE_LOGITS else 0))
        if ARE_LOGITS:
            norms = _norms(alpha_ptr, alpha_places, rows < num_rows, num_cells + 1, ACC, BLOCK_C)
        total = tl.zeros((BLOCK_R, BLOCK_D), ACC)
        for first_cell in range(0, num_cells, BLOCK_C):
            cells = first_cell + tl.arange(0, BLOCK_C)
            is_weight = (rows < num_rows)[:, None] & (cells < num_cells)[None, :]
            weights = tl.load(alpha_ptr + alpha_places[:, None] + cells[None, :], mask=is_weight,
                              other=0)
            if ARE_LOGITS:
                weights = weights.to(ACC) / norms[:, None]
                if tau_ptr is not None:
                    ties = tl.load(
                        beta_ptr + (rows % num_mixtures)[:, None] * num_cells + cells[None, :],
                        mask=is_weight, other=0)
                    weights += tl.load(tau_ptr).to(ACC) * (ties.to(ACC) - weights)
            elements = tl.load(
                cells_ptr + cells.to(tl.int64)[:, None] * num_columns + columns[None, :],
                mask=(cells < num_cells)[:, None] & (columns < num_columns)[None, :], other=0)
            total = tl.dot(weights.to(dtype), elements.to(dtype), total, input_precision=PRECISION,
                           out_dtype=ACC)
        row_places = _row_places(rows, num_mixtures, out_groups, in_groups, stride_n, stride_s,
                                 stride_og, stride_ig)
        if scale_ptr is not None:
            channels = ((rows % num_mixtures // in_groups % out_groups * (num_columns // run))
                        [:, None] + (columns // run)[None, :])
            total *= tl.load(
                scale_ptr + channels,
                mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :], other=0).to(ACC)
        tl.store(kernel_ptr + row_places[:, None] + column_places[None, :], total.to(dtype),
                 mask=(rows < num_rows)[:, None] & (columns < num_columns)[None, :])


@triton.jit(do_not_specialize=UNSPECIALIZED)
def _grad_cells_kernel(grad_ptr, alpha_ptr, cells_ptr, num_rows, num_cells, num_columns,
                       num_mixtures, out_groups, in_groups, run, positions, stride_n, stride_s,
                       stride_og, stride_ig, stride_o, stride_i, stride_p, ACC: tl.constexpr,
                       PRECISION: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr,
                       BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
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
            row_places = _row_places(rows, num_mixtures, out_groups, in_groups, stride_n, stride_s,
                                     stride_og, stride_ig)
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
                       num_mixtures, out_groups, in_groups, run, positions, stride_n, stride_s,
                       stride_og, stride_ig, stride_o, stride_i, stride_p, ACC: tl.constexpr,
                       PRECISION: tl.constexpr, ALIGNED: tl.constexpr, BLOCK_R: tl.constexpr,
                       BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr):
    """partial[split, row, cell] = sum of grad[row, column] cells[cell, column], over the
    split's columns.

    Grid: tiles of (rows, cells), then splits. Splits take blocks of columns in turn, and a
    block is read by all tiles at about the same time.
    """
    dtype = grad_ptr.dtype.element_ty
    cell_tiles = tl.cdiv(num_cells, BLOCK_C)
    rows = tl.program_id(0) // cell_tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    cells = tl.program_id(0) % cell_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    row_places = _row_places(rows, num_mixtures, out_groups, in_groups, stride_n, stride_s,
                             stride_og, stride_ig)
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


@triton.jit(do_not_specialize=['num_samples', 'out_groups', 'c_out', 'num_positions',
                               'cell_positions', 'in_groups'])
def _mix_bases_kernel(hidden_ptr, logits_ptr, bases_ptr, kernel_ptr, num_samples, num_logits,
                      num_bases, width, out_groups, c_out, num_positions, cell_positions,
                      in_groups, ACC: tl.constexpr, PRECISION: tl.constexpr,
                      BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr,
                      BLOCK_W: tl.constexpr):
    """kernel[sample, block, column] = sum_k h[sample, k] bases[block, k, column] / norm.

    Bases of units that are 0 for all samples of a tile are not read. Grid: blocks, then blocks of
    columns.
    """
    dtype = kernel_ptr.dtype.element_ty
    basis_block = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    # Blocks are ordered (out group, channel, position of a cell, within a cell, in group).
    position = basis_block // in_groups // cell_positions
    out_group = position // num_positions // c_out
    mixture = ((position % num_positions * out_groups + out_group) * in_groups
               + basis_block % in_groups)
    num_mixtures = num_positions * out_groups * in_groups
    for first_sample in range(0, num_samples, BLOCK_N):
        samples = first_sample + tl.arange(0, BLOCK_N)
        is_sample = samples < num_samples
        norms = _norms(logits_ptr, (samples.to(tl.int64) * num_mixtures + mixture) * num_logits,
                       is_sample, num_logits, ACC, BLOCK_C)
        total = tl.zeros((BLOCK_N, BLOCK_W), ACC)
        for first_basis in range(0, num_bases, BLOCK_H):
            bases = first_basis + tl.arange(0, BLOCK_H)
            units = tl.load(hidden_ptr + samples[:, None] * (num_bases - 1) + bases[None, :],
                            mask=is_sample[:, None] & (bases < num_bases - 1)[None, :], other=0)
            units = tl.where((bases == num_bases - 1)[None, :], 1.0, units.to(ACC))
            is_read = tl.max((units != 0).to(tl.int32), 0) > 0
            places = (basis_block.to(tl.int64) * num_bases + bases) * width
            elements = tl.load(bases_ptr + places[:, None] + columns[None, :],
                               mask=is_read[:, None] & (columns < width)[None, :], other=0)
            total = tl.dot(units.to(dtype), elements.to(dtype), total, input_precision=PRECISION,
                           out_dtype=ACC)
        places = (samples.to(tl.int64) * tl.num_programs(0) + basis_block) * width
        tl.store(kernel_ptr + places[:, None] + columns[None, :],
                 (total / norms[:, None]).to(dtype),
                 mask=is_sample[:, None] & (columns < width)[None, :])


class _Layout(NamedTuple):
    """The kernels' integer arguments from ``num_rows`` on, in this order."""

    num_rows: int
    num_cells: int
    num_columns: int
    num_mixtures: int
    out_groups: int
    in_groups: int
    run: int
    positions: int
    stride_n: int
    stride_s: int
    stride_og: int
    stride_ig: int
    stride_o: int
    stride_i: int
    stride_p: int

    @classmethod
    def of(cls, pieces: Tensor, num_cells: int) -> _Layout:
        """Reads the strides of pieces of kernels."""
        num_samples, num_positions, out_groups, in_groups, c_out, c_in, positions = pieces.shape
        num_mixtures = num_positions * out_groups * in_groups
        # The stride of a dimension of size 1 can be anything; 0 is a multiple of 16.
        strides = [stride if size > 1 else 0
                   for size, stride in zip(pieces.shape, pieces.stride())]
        return cls(num_samples * num_mixtures, num_cells, c_out * c_in * positions, num_mixtures,
                   out_groups, in_groups, c_in * positions, positions, *strides)

    def options(self, dtype: torch.dtype, block_r: int, block_c: int, block_d: int) -> dict:
        """The kernels' constant arguments, and how to launch them."""
        return dict(
            ACC=tl.float64 if dtype == torch.float64 else tl.float32,
            PRECISION=dot_precision(dtype), ALIGNED=self._is_aligned(), BLOCK_R=block_r,
            BLOCK_C=block_c, BLOCK_D=block_d, num_warps=4,
            num_stages=2 if dtype == torch.float64 else 3)

    def _is_aligned(self) -> bool:
        """Whether 16 columns from a multiple of 16 on are contiguous, at an aligned offset."""
        side_by_side = 1
        for size, stride in ((self.positions, self.stride_p),
                             (self.run // self.positions, self.stride_i),
                             (self.num_columns // self.run, self.stride_o)):
            if size > 1 and stride == side_by_side:
                side_by_side *= size
            elif stride % 16 or (size > 1 and side_by_side % 16):
                return False
        return side_by_side % 16 == 0


def assemble(alpha: Tensor, cells: Tensor, grid: Sequence[int], kernel_size: Sequence[int],
             scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``operators.assemble``; mixtures are written straight to their places.

    Sums are in float32 (float64 for float64). float32 factors are rounded to TF32 if torch's own
    products would be. Equal inputs give exactly equal results. A cell may have up to 2^31 elements.
    """
    return _assemble(alpha, None, None, cells, grid, kernel_size, scale, dtype, False)


def assemble_logits(logits: Tensor, beta: Tensor | None, tau: Tensor | None, cells: Tensor,
                    grid: Sequence[int], kernel_size: Sequence[int], scale: Tensor | None,
                    dtype: torch.dtype) -> Tensor:
    """``operators.assemble_logits``: as ``assemble``, and mixing weights never reach memory."""
    return _assemble(logits, beta, tau, cells, grid, kernel_size, scale, dtype, True)


def _assemble(alpha: Tensor, beta: Tensor | None, tau: Tensor | None, cells: Tensor,
              grid: Sequence[int], kernel_size: Sequence[int], scale: Tensor | None,
              dtype: torch.dtype, are_logits: bool) -> Tensor:
    memory = torch.empty(memory_shape(len(alpha), grid, cells.shape), dtype=dtype,
                         device=alpha.device)
    kernel = view_as_kernel(memory, grid, cells.shape, kernel_size)
    if kernel.numel() == 0:
        return kernel
    layout = _Layout.of(cut_kernel(kernel, grid, cells.shape[1:]), len(cells))
    most, terms, block_d = _blocks(dtype, layout.num_columns)
    block_r, block_c = block(layout.num_rows, 16, most), block(layout.num_cells, 16, terms)
    column_blocks = triton.cdiv(layout.num_columns, block_d)
    programs = _programs(triton.cdiv(layout.num_rows, block_r), column_blocks)
    with torch.cuda.device_of(alpha):
        _assemble_kernel[column_blocks, programs](
            alpha.contiguous(), None if beta is None else beta.contiguous(), tau,
            cells.contiguous(), None if scale is None else scale.contiguous(), kernel, *layout,
            ARE_LOGITS=are_logits, **layout.options(dtype, block_r, block_c, block_d))
    return kernel


def mix_bases(hidden: Tensor, logits: Tensor, bases: Tensor, grid: Sequence[int],
              kernel_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``operators.mix_bases``; norms are computed beside the product."""
    (num_blocks, num_bases, width), num_samples = bases.shape, len(hidden)
    out_groups, c_out, num_positions, cell_positions, in_groups = block_shape(grid, kernel_shape)
    memory = torch.empty((num_samples, kernel_shape[0], math.prod(kernel_shape[2:]),
                          kernel_shape[1]), dtype=dtype, device=bases.device)
    if memory.numel():
        block_w = block(width, 16, 64 if dtype == torch.float64 else 128)
        with torch.cuda.device_of(bases):
            _mix_bases_kernel[num_blocks, triton.cdiv(width, block_w)](
                hidden.contiguous(), logits.contiguous(), bases.contiguous(), memory, num_samples,
                logits.shape[2], num_bases, width, out_groups, c_out, num_positions,
                cell_positions, in_groups,
                ACC=tl.float64 if dtype == torch.float64 else tl.float32,
                PRECISION=dot_precision(dtype), BLOCK_N=16, BLOCK_C=64,
                BLOCK_H=block(num_bases, 16, 32), BLOCK_W=block_w, num_warps=4, num_stages=3)
    return positions_last(memory, kernel_shape[2:])


def assemble_grad_cells(pieces: Tensor, alpha: Tensor) -> Tensor:
    """``operators.assemble_grad_cells``; pieces are not copied."""
    cells = torch.empty(alpha.shape[2], *pieces.shape[4:], dtype=pieces.dtype,
                        device=pieces.device)
    if pieces.numel() == 0:
        return cells.zero_()
    layout = _Layout.of(pieces, len(cells))
    most, terms, block_d = _blocks(pieces.dtype, layout.num_columns)
    block_r, block_c = block(layout.num_rows, 16, terms), block(layout.num_cells, 16, most)
    column_blocks = triton.cdiv(layout.num_columns, block_d)
    programs = _programs(triton.cdiv(layout.num_cells, block_c), column_blocks)
    with torch.cuda.device_of(pieces):
        _grad_cells_kernel[column_blocks, programs](
            pieces, alpha.contiguous(), cells, *layout,
            **layout.options(pieces.dtype, block_r, block_c, block_d))
    return cells


def assemble_grad_alpha(pieces: Tensor, cells: Tensor) -> Tensor:
    """``operators.assemble_grad_alpha``; pieces are not copied."""
    shape = pieces.shape[0], math.prod(pieces.shape[1:4]), len(cells)
    factory: Any = dict(dtype=torch.promote_types(pieces.dtype, torch.float32),
                        device=pieces.device)
    if pieces.numel() == 0:
        return torch.zeros(shape, **factory)
    layout = _Layout.of(pieces, len(cells))
    most, terms, _ = _blocks(pieces.dtype, layout.num_columns)
    block_r, block_c = (block(layout.num_rows, 16, min(most, 64)),
                        block(layout.num_cells, 16, most))
    block_d = block(layout.num_columns, 16, terms)
    tiles = triton.cdiv(layout.num_rows, block_r) * triton.cdiv(layout.num_cells, block_c)
    # It depends on shapes only, and the order of sums is fixed, so results are always the same.
    splits = _programs(triton.cdiv(layout.num_columns, block_d), tiles)
    partial = torch.empty(splits, *shape, **factory)
    with torch.cuda.device_of(pieces):
        _grad_alpha_kernel[tiles, splits](
            pieces, cells.contiguous(), partial, *layout,
            **layout.options(pieces.dtype, block_r, block_c, block_d))
    return partial.sum(0) if splits > 1 else partial[0]


def _blocks(dtype: torch.dtype, num_columns: int) -> tuple[int, int, int]:
    """At most this many rows or cells in an output tile, terms of a sum, and columns at a time.

    They fill the registers: ptxas reports hardly any spills, and larger tiles spill. Shared memory
    stays below 80 KB. Small cells are cut finer, so that there are enough programs.
    """
    if dtype == torch.float64:
        return 32, 16, block(num_columns, 16, 64)
    columns = block(num_columns, 16, 128 if num_columns >= 128 * NUM_PROGRAMS else 64)
    return 64, 32 if dtype == torch.float32 else 64, columns


def _programs(tiles: int, others: int) -> int:
    """The number of programs that share tiles, with ``others`` in the grid's other direction."""
    return max(min(tiles, NUM_PROGRAMS // max(others, 1)), 1)
