"""The gradient of cells that many layers share, in one product.

Every layer of a warehouse has a gradient for all of its cells: ``alpha.T @ d_kernel``, as large as
the warehouse, from very few rows. Written and added up layer by layer these are what a training
step spends most on. Here each layer leaves its factors behind instead, and when the last of them
has, one product over the rows of all layers gives the sum.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef, WeakTensorKeyDictionary

from .autocast import autocast_dtype
from .backend import is_transformed, takes_cpu_products
from .cell_storage import reads_by_rows, store_by_rows
from .cpu_products import large_empty, mix_blocks

# Numbers between the rows of gathered gradients.
ROW_GAP = 64

# What stands for cells in the graphs that are alive, by cells and dtype: only those that meet in
# one graph are summed in one product.
_collectors: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def collect_gradients(cells: Tensor) -> Tensor:
    """Cells to be used in the place of a warehouse's own, so that their gradient is collected.

    Under autocast they have its dtype, converted once for all layers.

    Args:
        cells: A parameter, ``(n, c_out, c_in, *k)``.

    Returns:
        The same values; ``cells`` itself where no gradient is asked for, or where a compiler or a
        function transform would not understand.
    """
    if not (cells.requires_grad and cells.is_leaf and torch.is_grad_enabled()) or is_transformed():
        return cells
    dtype = autocast_dtype(cells.device.type) or cells.dtype
    alive = _collectors.setdefault(cells, {})
    collector = alive[dtype]() if dtype in alive else None
    # Parameters are given other memory, for example by ``.to()``, or other values without becoming
    # others.
    state = cells.data_ptr(), cells._version
    if collector is None or collector.grad_fn.state != state:
        collector = CellGradients.apply(cells.to(dtype), state)
        alive[dtype] = TensorWeakRef(collector)
    return collector


class CellGradients(torch.autograd.Function):
    """Stands between a warehouse and its layers, and waits for all of them in the backward pass."""

    @staticmethod
    def forward(ctx: Any, cells: Tensor, state: tuple[int, int]) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.state = state
        ctx.shape = cells.shape
        ctx.num_rows = 0  # of all uses so far
        # By backward pass: one that failed has left something behind.
        ctx.waiting = {}
        # Worth a copy for so many uses of torch's products. The backward pass has none for it.
        copies = reads_by_rows(cells) and not takes_cpu_products(cells)
        ctx.rows = store_by_rows(cells) if copies else None
        # Not a view, whose grad_fn an optimizer's step would take away.
        return cells.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        chunks = ctx.waiting.pop(torch._C._current_graph_task_id(), [])
        # There is a gradient already if the cells were used in a way that is none of ours.
        for product in (chunk.product().view(ctx.shape) for chunk in chunks):
            grad = product if grad is None else grad + product
        return grad, None


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
        alphas, grads = torch.cat(self.alphas).T, self.space[:self.num_rows]
        if not takes_cpu_products(alphas, grads):
            return alphas @ grads
        out = large_empty((len(alphas), grads.shape[1]), grads)
        return mix_blocks(alphas, grads.unsqueeze(0), out.unsqueeze(0)).squeeze(0)


def collector_of(cells: Tensor) -> Any:
    """The collector behind cells that ``collect_gradients`` returned; None for any others."""
    if torch.compiler.is_compiling() or not isinstance(cells.grad_fn, CellGradients._backward_cls):
        return None
    return cells.grad_fn


def leave_factors(collector: Any, alpha: Tensor, grads: Tensor) -> Tensor:
    """Adds ``alpha.T @ grads`` to the gradient of the cells behind a collector.

    To be called in a backward pass, by a function that has the cells of the collector among its
    inputs and returns None for their gradient.

    Args:
        collector: What ``collector_of`` returned.
        alpha: ``(R, n)``.
        grads: R times as many numbers as a cell has, in the order of R's rows. Any strides.

    Returns:
        ``grads`` as ``(R, D)``, each row contiguous.
    """
    collector.rows = None
    size = math.prod(collector.shape[1:])
    # In a pass that asks for other gradients alone nobody would come for them.
    if not torch._C._will_engine_execute_node(collector):
        return grads.reshape(len(alpha), size)
    chunks = collector.waiting.setdefault(torch._C._current_graph_task_id(), [])
    if torch.is_grad_enabled():
        # A second derivative is to follow, which must find the factors as they were computed.
        chunks.append(_Chunk(grads.reshape(len(alpha), size)))
        return chunks[-1].take(alpha)
    if not chunks or len(chunks[-1].space) - chunks[-1].num_rows < len(alpha):
        rows = max(collector.num_rows, len(alpha))
        # Rows a power of two apart would all be after the same few places of a cache.
        chunks.append(_Chunk(large_empty((rows, size + ROW_GAP), grads)[:, :size]))
    place = chunks[-1].take(alpha)
    place.view(grads.shape).copy_(grads)
    return place
