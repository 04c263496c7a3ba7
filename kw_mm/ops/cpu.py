"""The operators on CPUs: the compiled products where they pay, else torch's."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compiled, products
from .attention import logit_norms, mixing_weights
from .cell_storage import stored_by_rows
from .layout import has_positions_last, memory_shape, view_as_kernel
from .memory import large_empty, reused_empty


def assemble(alpha: Tensor, cells: Tensor, grid: Sequence[int], kernel_size: Sequence[int],
             scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See ``operators.assemble``."""
    if not compiled.mixes(cells, dtype) or not _pays(cells, grid):
        return products.assemble(alpha, cells, grid, kernel_size, scale, dtype)
    c_out = cells.shape[1]
    num_samples, (num_positions, num_out_groups, num_in_groups) = alpha.shape[0], grid
    memory = reused_empty(memory_shape(num_samples, grid, cells.shape), dtype)
    # (c_out, N, S, OG, IG, width): the rows of a cell, then the order of alpha.
    places = memory.view(num_samples, num_out_groups, c_out, num_positions, num_in_groups,
                         math.prod(cells.shape[2:])).permute(2, 0, 3, 1, 4, 5)
    blocks, scales = cells.flatten(2).transpose(0, 1), None
    if scale is not None:
        scales = scale.view(1, 1, num_out_groups, c_out, 1).permute(3, 0, 1, 2, 4).expand(
            places.shape[:-1]).flatten(1)
    elif num_positions == num_in_groups == 1 and not stored_by_rows(cells):
        # The result is the kernel already: one block of whole cells.
        places, blocks = places.permute(1, 2, 3, 4, 0, 5).flatten(4).unsqueeze(0), cells.flatten(
            1).unsqueeze(0)
    compiled.mix_blocks(alpha.flatten(0, 1), blocks, places, scales=scales)
    return view_as_kernel(memory, grid, cells.shape, kernel_size)


def assemble_logits(logits: Tensor, beta: Tensor | None, tau: Tensor | None, cells: Tensor,
                    grid: Sequence[int], kernel_size: Sequence[int], scale: Tensor | None,
                    dtype: torch.dtype) -> Tensor:
    """See ``operators.assemble_logits``."""
    return assemble(mixing_weights(logits, beta, tau), cells, grid, kernel_size, scale, dtype)


def assemble_grad_alpha(pieces: Tensor, cells: Tensor) -> Tensor:
    """See ``operators.assemble_grad_alpha``."""
    if not compiled.sums(pieces, cells):
        return products.assemble_grad_alpha(pieces, cells)
    rows = pieces.reshape(math.prod(pieces.shape[:4]), math.prod(pieces.shape[4:]))
    return compiled.sum_products(rows, cells.flatten(1)).view(
        pieces.shape[0], math.prod(pieces.shape[1:4]), cells.shape[0])


def assemble_grad_cells(pieces: Tensor, alpha: Tensor) -> Tensor:
    """See ``operators.assemble_grad_cells``."""
    if not compiled.mixes(pieces, pieces.dtype):
        return products.assemble_grad_cells(pieces, alpha)
    alphas = alpha.flatten(0, 1).T
    rows = pieces.reshape(alphas.shape[1], math.prod(pieces.shape[4:]))
    grads = large_empty((alphas.shape[0], rows.shape[1]), pieces.dtype)
    compiled.mix_blocks(alphas, rows.unsqueeze(0), grads.unsqueeze(0))
    return grads.view(len(grads), *pieces.shape[4:])


def mix_bases(hidden: Tensor, logits: Tensor, bases: Tensor, grid: Sequence[int],
              kernel_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See ``operators.mix_bases``."""
    num_samples, (num_blocks, _, width) = hidden.shape[0], bases.shape
    weights = products.with_constant(hidden)
    # For one sample, only the bases of active units are read.
    active = weights[0].nonzero().squeeze(1) if num_samples == 1 else None
    by_block = products.scales_by_block(1 / logit_norms(logits), grid, kernel_shape)
    if compiled.mixes(bases, dtype):
        mixed = reused_empty((num_samples, num_blocks, width), dtype)
        compiled.mix_blocks(weights, bases, mixed.transpose(0, 1), active, by_block.T)
    elif active is not None and bases.dtype == dtype:
        mixed = _sum_active(weights[0, active], by_block[0], bases, active).unsqueeze(0)
    else:
        return products.mix_bases(hidden, logits, bases, grid, kernel_shape, dtype)
    return products.bases_as_kernel(mixed, kernel_shape)


def _pays(cells: Tensor, grid: Sequence[int]) -> bool:
    """Whether the compiled products are the faster way to mix such cells."""
    # They are faster only where mixtures come in the order in which they are written.
    return (math.prod(cells.shape[2:]) >= compiled.MIN_BLOCK_ROW
            and (grid[0] == 1 or has_positions_last(grid, cells.shape)))


def _sum_active(weights: Tensor, scales: Tensor, bases: Tensor, active: Tensor) -> Tensor:
    """One sample's mixtures ``(B, width)`` of some bases."""
    num_blocks, num_bases, _ = bases.shape
    starts = torch.arange(0, num_blocks * num_bases, num_bases).unsqueeze(1)
    factors = (scales.unsqueeze(1) * weights).to(bases.dtype)
    return F.embedding_bag(starts + active, bases.flatten(0, 1), mode='sum',
                           per_sample_weights=factors)
