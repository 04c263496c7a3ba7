"""The gradient of cells that many layers share, in one product.

Every layer of a warehouse has a gradient for all of its cells: ``alpha.T @ d_kernel``, as large as
the warehouse, from very few rows. Writing and adding these layer by layer would take most of a
training step (docs/performance.md). Instead each layer stores its factors, and after the last layer
one product over the rows of all layers gives the sum.

This is for ordinary training with torch's autograd. If anything else records or rewrites the
computation, each layer computes its gradient by itself.
"""
from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from . import dispatch, operators
from .autocast import product_dtype
from .layout import cut_kernel
from .memory import large_empty

logger = logging.getLogger(__name__)

# Numbers between the rows of gathered gradients. Rows a power of two apart would compete for the
# same few places of a cache.
ROW_GAP = 64

# Torch has no public way to ask whether function transforms and modes are at work, which backward
# pass is running, and whether that pass will reach a node. Where one of these functions is missing,
# nothing is collected.
INTERNALS = ('_are_functorch_transforms_active', '_len_torch_dispatch_stack',
             '_current_graph_task_id', '_will_engine_execute_node')

# The collectors of the graphs that are alive, by cells and dtype. Gradients are summed in one
# product only if they belong to the same graph.
_collectors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def collect_gradients(cells: Tensor) -> Tensor:
    """Returns cells to use instead of a warehouse's own, so that their gradient is collected.

    Under autocast they have its dtype, converted once for all layers.

    Args:
        cells: A parameter, ``(n, c_out, c_in, *k)``.

    Returns:
        The same values; ``cells`` itself if it needs no gradient, or if more than torch's autograd
        is at work.
    """
    if not (torch.is_grad_enabled() and cells.requires_grad and cells.is_leaf
            and type(cells) in (Tensor, nn.Parameter) and is_undisturbed()):
        return cells
    dtype = product_dtype(cells)
    alive = _collectors.setdefault(cells, {})
    collector = alive[dtype]() if dtype in alive else None
    # A parameter stays the same object when its memory changes, as by ``.to()``, or its values.
    state = cells.data_ptr(), cells._version
    if collector is None or collector.grad_fn.state != state:
        collector = CellGradients.apply(cells.to(dtype), state)
        alive[dtype] = TensorWeakRef(collector)
    return collector


def is_collected(cells: Tensor) -> bool:
    """Whether ``collect_gradients`` returned these cells, not as they were."""
    return (torch.is_grad_enabled() and _is_eager()
            and isinstance(cells.grad_fn, CellGradients._backward_cls))


def assemble_collected(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                       kernel_size: Sequence[int]) -> Tensor:
    """``operators.assemble`` of collected cells, which leaves their gradient to the collector."""
    return _AssembleCollected.apply(alpha, cells, cells.grad_fn, grid, kernel_size)


class CellGradients(torch.autograd.Function):
    """Stands between a warehouse and its layers, and waits for all of them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, state: tuple[int, int]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state = state
        ctx.shape = cells.shape
        ctx.num_rows = 0  # of all uses so far
        # Keyed by backward pass, because a pass that failed leaves its entries behind.
        ctx.waiting = {}
        # Not a view, whose grad_fn an optimizer's step would take away.
        return cells.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        chunks = ctx.waiting.pop(torch._C._current_graph_task_id(), [])
        # There is a gradient already if other code than ours used the cells as well.
        for product in (chunk.product().view(ctx.shape) for chunk in chunks):
            grad = product if grad is None else grad + product
        return grad, None


class _AssembleCollected(torch.autograd.Function):
    """Kernels whose cells get their gradient from the collector."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, cells: Tensor, collector: Any, grid: Sequence[int],
                kernel_size: Sequence[int]) -> Tensor:
        ctx.save_for_backward(alpha, cells)
        # Activation checkpointing drops saved tensors. Without this reference the next layer would
        # find no collector and make another one, with a copy of all cells.
        ctx.held = cells
        ctx.collector = collector
        ctx.grid = grid
        collector.num_rows += len(alpha) * alpha.shape[1]
        return operators.assemble(alpha, cells, grid, kernel_size, None, cells.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        alpha, cells = ctx.saved_tensors
        ctx.held = None
        pieces = _leave_factors(ctx.collector, alpha, cut_kernel(grad, ctx.grid, cells.shape[1:]))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        return operators.assemble_grad_alpha(pieces, cells).to(alpha.dtype), None, None, None, None


class _Chunk:
    """Factors of a product, gathered row by row in one place."""

    def __init__(self, space: Tensor) -> None:
        self.space = space
        self.alphas: list[Tensor] = []
        self.num_rows = 0

    def take(self, alpha: Tensor) -> Tensor:
        """The place of the gradients that belong to rows of alpha."""
        start = self.num_rows
        self.alphas.append(alpha)
        self.num_rows += len(alpha)
        return self.space[start:self.num_rows]

    def product(self) -> Tensor:
        alphas, grads = torch.cat(self.alphas), self.space[:self.num_rows]
        # As the pieces of one kernel with that many output groups.
        return operators.assemble_grad_cells(
            grads.view(1, 1, len(grads), 1, 1, 1, grads.shape[1]), alphas[None])


def _leave_factors(collector: Any, alpha: Tensor, pieces: Tensor) -> Tensor:
    """Stores a layer's part of the gradient of the cells behind a collector.

    It is called in a backward pass, by a function that has the cells of the collector as an input
    and returns None for their gradient.

    Args:
        collector: The ``grad_fn`` of collected cells.
        alpha: ``(N, m, n)``.
        pieces: Gradient of the kernels as ``cut_kernel`` cuts it, any strides.

    Returns:
        ``pieces``, as a view of the gathered factors if they were gathered.
    """
    # If this pass does not ask for the gradient of the cells, nobody would fetch the factors.
    if not torch._C._will_engine_execute_node(collector):
        return pieces
    alpha = alpha.flatten(0, 1)
    size = math.prod(collector.shape[1:])
    chunks = collector.waiting.setdefault(torch._C._current_graph_task_id(), [])
    if torch.is_grad_enabled():
        # The factors become part of the graph of a second derivative and must not be copied.
        chunks.append(_Chunk(pieces.reshape(len(alpha), size)))
        chunks[-1].take(alpha)
        return pieces
    if not chunks or len(chunks[-1].space) - chunks[-1].num_rows < len(alpha):
        shape = max(collector.num_rows, len(alpha)), size + ROW_GAP
        space = (large_empty(shape, pieces.dtype) if pieces.device.type == 'cpu' else
                 pieces.new_empty(shape))
        chunks.append(_Chunk(space[:, :size]))
    place = chunks[-1].take(alpha).view(pieces.shape)
    return place.copy_(pieces)


def _is_eager() -> bool:
    """Whether no compiler reads this code."""
    return not (torch.jit.is_tracing() or dispatch.is_compiling())


def is_undisturbed() -> bool:
    """Whether no compiler, transform, mode or forward-mode derivative is at work."""
    return (_is_eager() and _has_internals() and not torch._C._are_functorch_transforms_active()
            and torch._C._len_torch_dispatch_stack() == 0
            and getattr(forward_ad, '_current_level', 0) < 0)


@functools.lru_cache(maxsize=1)
def _has_internals() -> bool:
    missing = [name for name in INTERNALS if not hasattr(torch._C, name)]
    if missing:
        logger.warning('torch %s has no %s: gradients of cells are computed layer by layer, slower',
                       torch.__version__, ', '.join(missing))
    return not missing
