"""A trained module made ready for inference, in place."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..arguments import checks_arguments
from ..convert.surgery import hidden_references, swap_
from ..layers import KWConv1d, KWConv2d, KWConv3d
from ..ops.cell_storage import reads_by_rows, store_by_rows
from ..table import format_table
from .budget import choose_layers
from .layers import OptimizedConv, fold_norm
from .norms import find_norms, has_hooks

# 1.5 GiB: what reads fewer bytes than cells do in a KW-ResNet50 of budget 4.
DEFAULT_BUDGET = 1536 * 2**20

KW_CONVS = (KWConv1d, KWConv2d, KWConv3d)
STATIC_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class OptimizedLayer:
    """What was done to a layer.

    Attributes:
        name: Its path in the module.
        num_cells: Cells of its warehouse, n.
        num_bases: Bases that its kernels come from instead, hidden + 1, or 0.
        num_bytes: Memory that they take.
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
        skipped: Names of KW layers left as they are, for they are also held beside the module
            tree, have forward hooks, or have an attention that was pruned, quantized or wrapped.
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
    """Computes once, in place, what is the same for every image; outputs stay what they were.

    The module is set to evaluation and cannot be trained any more: optimize a copy
    (``copy.deepcopy``) to keep the original. What is done, all of it exact up to rounding:

    - batch norms, the attentions' and those right behind a convolution, are folded away;
    - the temperature is fixed at its present value (0 outside training from scratch);
    - where it pays, and tau is 0, a layer's logits are contracted with its cells to *bases*
      (``kw_mm.ops.bases``), chosen by what they save per byte;
    - cells that are still read on a CPU are stored in the order in which they are.

    Args:
        module: Any module with KW layers inside, in any precision.
        memory_budget: Bytes that all bases together may take, at least 0; 1.5 GiB by default.
        storage_dtype: ``torch.bfloat16`` to keep bases and cells in half the memory, which small
            images are spent on reading. Their mixtures are summed up in the module's own precision,
            but outputs are no longer exact (docs/performance.md). None leaves them as they are.

    Returns:
        What was done; prints as a table. Empty if all KW layers were optimized before.

    Raises:
        TypeError: If ``memory_budget`` is not an integer.
        ValueError: If it is negative, ``storage_dtype`` is another dtype or not narrower than the
            cells', there is no KW layer in the module, or the module is itself one, which cannot be
            replaced in place.
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
    held = hidden_references(module)
    convs = {name: conv for name, conv in found.items()
             if conv not in held and conv.attention.is_plain
             and not any(map(has_hooks, conv.modules()))}
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
    _store_cells_(module, storage_dtype)
    return OptimizationReport(tuple(layers), num_folded,
                              tuple(name for name in found if name not in convs))


def _store_cells_(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Puts cells into the order in which they are read, and into a dtype."""
    trained = {(layer.manager, layer.plan.warehouse) for layer in module.modules()
               if isinstance(layer, KW_CONVS)}
    read = {(layer.manager, layer.plan.warehouse) for layer in module.modules()
            if isinstance(layer, OptimizedConv) and layer.bases is None}
    for manager, index in read:
        cells = manager.weights[index]
        if reads_by_rows(cells):
            cells.data = store_by_rows(cells.data)
        # Layers that were left as they are want cells of their own precision.
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
