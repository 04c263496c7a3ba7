"""The operators with torch's own products, for any device and precision.

All functions are differentiable, because they are also used where no operators are registered.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import dispatch
from .attention import logit_norms, mixing_weights
from .cell_storage import MIN_CELLS, stored_by_rows
from .layout import block_shape, has_positions_last, memory_shape, positions_last, view_as_kernel

# A product of few rows and a very wide matrix runs at a fraction of a CPU's rate. Cut into blocks
# of at least so many columns it is a batch of products that stay in the cache, 2 to 4 times as
# fast. Smaller cells are not worth it.
BLOCK_WIDTH = 512
MIN_BLOCKED_SIZE = 2**14
# A kernel that was computed in blocks has to be copied into place. Where the result of a single
# product is the kernel already, blocks pay only if there are so many times more cells than rows.
ROWS_TO_CELLS = 4
# The gradient of the mixing weights has few results, which would keep only one thread busy. So its
# sums are cut into parts of so many columns.
SUM_WIDTH = 2**14


def assemble(alpha: Tensor, cells: Tensor, grid: Sequence[int], kernel_size: Sequence[int],
             scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See ``operators.assemble``."""
    alphas = alpha.flatten(0, 1)
    if not alpha.dtype == cells.dtype == dtype:
        alphas, cells = alphas.to(dtype), cells.to(dtype)
    c_out, c_in = cells.shape[1:3]
    # Whether the result of a single product, mixtures one after the other, is the kernel.
    fits = grid[0] == grid[2] == 1 and scale is None
    rows = c_out if _takes_one_product(cells, alphas.shape[0], fits) else _rows_per_block(cells)
    if rows == c_out:
        mixtures = alphas @ cells.flatten(1)
    else:
        mixtures = _batch_product(
            alphas, cells.reshape(cells.shape[0], c_out // rows, -1).transpose(0, 1))
    # (blocks, N, S, OG, IG, rows, c_in, k)
    mixtures = mixtures.view(c_out // rows, alpha.shape[0], *grid, rows, c_in,
                             math.prod(cells.shape[3:]))
    if scale is not None:
        mixtures = mixtures * scale.to(dtype).view(grid[1], -1, rows).permute(1, 0, 2)[
            :, None, None, :, None, :, None, None]
    # As in memory_shape.
    is_last = has_positions_last(grid, cells.shape)
    order = (1, 3, 0, 5, 2, 4, 6, 7) if is_last else (1, 3, 0, 5, 4, 6, 2, 7)
    memory = mixtures.permute(order).reshape(memory_shape(alpha.shape[0], grid, cells.shape))
    return view_as_kernel(memory.contiguous(), grid, cells.shape, kernel_size)


def assemble_logits(logits: Tensor, beta: Tensor | None, tau: Tensor | None, cells: Tensor,
                    grid: Sequence[int], kernel_size: Sequence[int], scale: Tensor | None,
                    dtype: torch.dtype) -> Tensor:
    """See ``operators.assemble_logits``."""
    return assemble(mixing_weights(logits, beta, tau), cells, grid, kernel_size, scale, dtype)


def assemble_grad_alpha(pieces: Tensor, cells: Tensor) -> Tensor:
    """See ``operators.assemble_grad_alpha``."""
    rows = pieces.reshape(math.prod(pieces.shape[:4]), math.prod(pieces.shape[4:]))
    # The values with which the kernels were mixed.
    columns = cells.flatten(1).to(rows.dtype)
    # Sums of so many terms overflow float16 and lose all precision in bfloat16.
    dtype = torch.promote_types(rows.dtype, torch.float32)
    rows, columns = rows.to(dtype), columns.to(dtype)
    if rows.device.type != 'cpu' or rows.shape[1] % SUM_WIDTH:
        sums = rows @ columns.T
    else:
        num_parts = rows.shape[1] // SUM_WIDTH
        rows, columns = (t.reshape(len(t), num_parts, SUM_WIDTH).transpose(0, 1)
                         for t in (rows, columns))
        sums = (rows @ columns.transpose(1, 2)).sum(0)
    return sums.view(pieces.shape[0], math.prod(pieces.shape[1:4]), cells.shape[0])


def assemble_grad_cells(pieces: Tensor, alpha: Tensor) -> Tensor:
    """See ``operators.assemble_grad_cells``."""
    rows = pieces.reshape(math.prod(pieces.shape[:4]), math.prod(pieces.shape[4:]))
    grads = alpha.flatten(0, 1).T.to(rows.dtype) @ rows
    return grads.view(alpha.shape[2], *pieces.shape[4:])


def mix_bases(hidden: Tensor, logits: Tensor, bases: Tensor, grid: Sequence[int],
              kernel_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See ``operators.mix_bases``."""
    # Few rows and a wide matrix, as in assembly; bases are stored in blocks.
    mixed = _batch_product(with_constant(hidden).to(dtype), bases.to(dtype)).transpose(0, 1)
    # (N, OG, c_out, S, positions, IG, width), divided while it is brought into this order.
    blocks = mixed.unflatten(1, block_shape(grid, kernel_shape))
    norms = logit_norms(logits).unflatten(1, grid).transpose(1, 2)[:, :, None, :, None, :, None]
    return bases_as_kernel(_divide(blocks, norms), kernel_shape)


def with_constant(hidden: Tensor) -> Tensor:
    """What the bases are mixed by: hidden units, and 1 for the last one, ``(N, hidden + 1)``."""
    # Not len(hidden): a traced graph would keep it as a number.
    return torch.cat((hidden, hidden.new_ones(hidden.shape[0], 1)), 1)


def scales_by_block(scales: Tensor, grid: Sequence[int], kernel_shape: Sequence[int]) -> Tensor:
    """Repeats values of mixtures, ``(N, m)``, for each of their blocks of bases, ``(N, B)``."""
    # (N, S, OG, IG) to (N, OG, c_out, S, positions, IG)
    by_place = scales.unflatten(1, grid).transpose(1, 2)[:, :, None, :, None, :]
    return by_place.expand(-1, *block_shape(grid, kernel_shape)).flatten(1)


def bases_as_kernel(mixed: Tensor, kernel_shape: Sequence[int]) -> Tensor:
    """Kernels ``(N, *kernel_shape)`` of mixed bases, ``(N, B, width)`` in any shape."""
    out_channels, in_channels, *kernel_size = kernel_shape
    memory = mixed.reshape(mixed.shape[0], out_channels, math.prod(kernel_size), in_channels)
    return positions_last(memory.contiguous(), kernel_size)


def _divide(values: Tensor, divisors: Tensor) -> Tensor:
    """The quotients as new memory, in the order of dimensions, in the dtype of the values."""
    # Autograd and transforms, which see this code where it is not inside an operator, refuse out=.
    if torch.is_grad_enabled() or not dispatch.IS_POSSIBLE:
        return (values / divisors).to(values.dtype).contiguous()
    return torch.div(values, divisors, out=values.new_empty(values.shape))


def _batch_product(left: Tensor, right: Tensor) -> Tensor:
    """``(R, n)``, or ``(B, R, n)``, times each of ``(B, n, width)``: ``(B, R, width)``."""
    if right.shape[0] == 1:
        return torch.matmul(left.flatten(0, -2), right[0]).unsqueeze(0)
    return torch.bmm(left.expand(right.shape[0], -1, -1), right)


def _takes_one_product(cells: Tensor, num_rows: int, fits: bool) -> bool:
    """Whether blocks would not pay for a product of so many rows with cells."""
    # On a GPU a single product is fast. On the meta device, tools count its FLOPs.
    if cells.device.type != 'cpu' or math.prod(cells.shape[1:]) < MIN_BLOCKED_SIZE:
        return True
    if stored_by_rows(cells):
        return False
    # With few cells, writing the mixtures dominates the cost.
    return len(cells) < MIN_CELLS or (fits and len(cells) < ROWS_TO_CELLS * num_rows)


def _rows_per_block(cells: Tensor) -> int:
    c_out, width = cells.shape[1], math.prod(cells.shape[2:])
    if stored_by_rows(cells):
        return 1
    return next(rows for rows in range(1, c_out + 1)
                if c_out % rows == 0 and (rows * width >= BLOCK_WIDTH or rows == c_out))
