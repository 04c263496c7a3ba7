"""Makes a trained module fast at inference, in place."""
from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..arguments import checks_arguments
from ..convert.surgery import hidden_references, swap_
from ..layers.conv import KW_CONVS, has_hooks
from ..ops.cell_storage import reads_by_rows, store_by_rows
from ..table import format_table
from .budget import choose_layers
from .layers import NOT_TRAINABLE, OptimizedConv, fold_norm
from .norms import find_norms

# 1.5 GiB: enough for all bases that read fewer bytes than cells in a KW-ResNet50 of budget 4.
DEFAULT_BUDGET = 1536 * 2**20

STATIC_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class OptimizedLayer:
    """What was done to a layer.

    Attributes:
        name: Its path in the module.
        num_cells: Cells of its warehouse, n.
        num_bases: Bases that its kernels are mixed from, hidden + 1; 0 if they are mixed from
            cells.
        num_bytes: Memory that its bases take.
        folded: Whether the batch norm behind the layer is now part of it.
    """

    name: str
    num_cells: int
    num_bases: int
    num_bytes: int
    folded: bool


@dataclass(frozen=True)
class OptimizationReport:
    """What ``optimize_for_inference_`` did; prints as a table.

    Attributes:
        layers: The KW layers.
        num_folded: Batch norms folded into the convolution before them, static ones included.
        skipped: Names of KW layers that were not changed, because an attribute outside the module
            tree refers to them too, they have forward hooks, or their attention was pruned,
            quantized or wrapped.
    """

    layers: tuple[OptimizedLayer, ...]
    num_folded: int
    skipped: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Memory taken by all bases."""
        return sum(layer.num_bytes for layer in self.layers)

    def __str__(self) -> str:
        rows = [(layer.name, f'{layer.num_cells:,}', f'{layer.num_bases:,}' if layer.num_bases else
                 '-', f'{layer.num_bytes / 2**20:,.1f}', 'folded' if layer.folded else '-')
                for layer in self.layers]
        lines = [format_table(('layer', 'cells', 'bases', 'MiB', 'norm'), rows, right=(1, 2, 3)),
                 f'{self.num_bytes / 2**20:,.1f} MiB in bases, {self.num_folded} norms folded']
        if self.skipped:
            lines.append('left as they are, hooked, wrapped or referred to elsewhere: '
                         + ', '.join(self.skipped))
        return '\n'.join(lines)


@torch.no_grad()
@checks_arguments('memory_budget')
def optimize_for_inference_(module: nn.Module, memory_budget: int | None = None,
                            storage_dtype: torch.dtype | None = None) -> OptimizationReport:
    """Computes in place, once, what is the same for every image. Outputs stay the same.

    The module is set to evaluation and cannot be trained any more: ``train()``, of the module or of
    any part with such layers in it, is a RuntimeError that changes nothing. Optimize a copy
    (``copy.deepcopy``) to keep the original. What is done, all of it exact up to rounding:

    - batch norms of attentions, and those that directly follow a convolution, are folded away;
    - the temperature is fixed at its current value (0 except while training from scratch);
    - where it pays, and tau is 0, the last linear layer of the attention is multiplied with the
      cells in advance, which gives *bases* (``kw_mm.ops.bases``); layers are chosen by the time
      saved per byte;
    - cells that are still used on a CPU are stored in the order in which they are read.

    Args:
        module: Any module with KW layers inside, in any precision.
        memory_budget: Bytes that all bases together may take, at least 0; 1.5 GiB by default.
        storage_dtype: ``torch.bfloat16`` stores bases and cells in half the memory. That makes
            small images faster, whose time goes into reading them. Sums are in the module's own
            precision, but outputs are no longer exact (docs/performance.md). None keeps their
            dtype.

    Returns:
        A report, which prints as a table. It is empty if all KW layers were optimized before.

    Raises:
        TypeError: If ``memory_budget`` is not an integer.
        ValueError: If ``memory_budget`` is negative, ``storage_dtype`` is another dtype or not
            narrower than the cells', the module has no KW layer inside, or it is itself a KW layer,
            which cannot be replaced in place.
    """
    budget = _check_budget(memory_budget)
    if storage_dtype not in (None, torch.bfloat16):
        raise ValueError(f'storage_dtype must be torch.bfloat16 or None, got {storage_dtype!r}')
    if isinstance(module, KW_CONVS):
        raise ValueError(f'module must contain KW layers, not be one, got a '
                         f'{type(module).__name__}; put it into an nn.Sequential')
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, KW_CONVS)}
    if not found and not any(isinstance(m, OptimizedConv) for m in module.modules()):
        raise ValueError(f'module must contain KW layers, got a {type(module).__name__} without')
    narrow = {conv.cells.dtype for conv in found.values() if conv.cells.itemsize <= 2}
    if storage_dtype is not None and narrow:
        raise ValueError(f'storage_dtype must be None for cells of {narrow.pop()}, which are as '
                         f'narrow as {storage_dtype}')
    module.eval()
    fixed = find_fixed(module)
    convs = {name: conv for name, conv in found.items() if name not in fixed}
    norms = find_norms(module, (*KW_CONVS, *STATIC_CONVS))
    with_bases = choose_layers(
        {name: conv.plan for name, conv in convs.items() if not conv.attention.is_tied},
        {name: (storage_dtype or conv.cells.dtype).itemsize for name, conv in convs.items()},
        budget)
    replacements: dict[nn.Module, nn.Module] = {}
    layers = []
    for name, conv in convs.items():
        norm = norms.get(conv)
        optimized = OptimizedConv(conv, None if norm is None else fold_norm(norm),
                                  name in with_bases, storage_dtype)
        replacements[conv] = optimized
        layers.append(OptimizedLayer(name, conv.plan.num_cells, optimized.num_bases,
                                     optimized.num_bytes, norm is not None))
    before: Any
    behind: Any
    for before, behind in norms.items():
        if before in replacements:
            replacements[behind] = nn.Identity().eval()
        elif type(before) in STATIC_CONVS:
            replacements[before] = fuse_conv_bn_eval(before, behind)
            replacements[behind] = nn.Identity().eval()
    num_folded = sum(isinstance(new, nn.Identity) for new in replacements.values())
    swap_(module, replacements)
    _refuse_training_(module)
    _store_cells_(module, storage_dtype)
    return OptimizationReport(tuple(layers), num_folded,
                              tuple(name for name in found if name not in convs))


def _refuse_training_(root: nn.Module) -> None:
    """Makes every module with optimized layers inside refuse ``train()``.

    The layers refuse it themselves, but by then their parents and the layers before them would be
    in training already, with dropout and batch statistics.
    """
    for module in root.modules():
        if _holds_optimized(module) and not isinstance(module, OptimizedConv):
            # A partial of a module's function, unlike a method, is copied and pickled with it.
            module.train = functools.partial(_train, module)  # type: ignore[method-assign]


def _train(module: nn.Module, mode: bool = True) -> nn.Module:
    if mode and _holds_optimized(module):
        raise RuntimeError(NOT_TRAINABLE)
    return type(module).train(module, mode)


def _holds_optimized(module: nn.Module) -> bool:
    return any(isinstance(inner, OptimizedConv) for inner in module.modules())


def find_fixed(module: nn.Module) -> list[str]:
    """Names of KW layers that cannot be put into another form.

    They are also held beside the module tree, have forward hooks, or have an attention that was
    pruned, quantized or wrapped.
    """
    held = hidden_references(module)
    return [name for name, conv in module.named_modules() if isinstance(conv, KW_CONVS) and (
        conv in held or not conv.attention.is_plain or any(map(has_hooks, conv.modules())))]


def _store_cells_(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Stores cells in the order in which they are read, and in ``dtype``."""
    trained = {(layer.manager, layer.plan.warehouse) for layer in module.modules()
               if isinstance(layer, KW_CONVS)}
    read = {(layer.manager, layer.plan.warehouse) for layer in module.modules()
            if isinstance(layer, OptimizedConv) and layer.bases is None}
    for manager, index in read:
        cells = manager.weights[index]
        if reads_by_rows(cells):
            cells.data = store_by_rows(cells.data)
        # Layers that were not changed need cells of their own precision.
        if dtype is not None and (manager, index) not in trained:
            cells.data = cells.data.to(dtype)


def _check_budget(memory_budget: int | None) -> int:
    if memory_budget is None:
        return DEFAULT_BUDGET
    if isinstance(memory_budget, bool) or not isinstance(memory_budget, int):
        raise TypeError(f'memory_budget must be an integer of bytes, got {memory_budget!r}')
    if memory_budget < 0:
        raise ValueError(f'memory_budget must be at least 0, got {memory_budget!r}')
    return memory_budget
