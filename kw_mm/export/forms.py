"""A module with KW layers in the form in which it leaves PyTorch."""
from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..convert.surgery import swap_
from ..inference import OptimizationReport, OptimizedConv, optimize_for_inference_
from ..inference.optimization import find_fixed
from ..layers import KWLinear
from ..layers.conv import KW_CONVS, has_hooks
from .layers import ExportConv, ExportLinear

WEIGHTS = ('bases', 'cells')


@torch.no_grad()
def prepare_for_export_(module: nn.Module, weights: str = 'bases',
                        memory_budget: int | None = None,
                        batch_size: int | None = None) -> OptimizationReport | None:
    """Gives a module the form in which exporters take it, in place; outputs stay what they were.

    Batch norms are folded away as ``optimize_for_inference_`` does. Then each KW layer is made of
    matrix products, slices and sums alone, with any batch size of at least 1 and any image size.
    Neither custom operators nor convolutions whose groups depend on the batch are left. For a
    single batch size each layer is one convolution with a computed kernel, which is faster.

    The module cannot be trained any more, and is slower in PyTorch than the optimised one: prepare
    a copy (``copy.deepcopy``) to keep the original.

    Args:
        module: In evaluation mode, with KW layers inside, optimised for inference or not. One
            without any is left alone.
        weights: What the file holds. ``'cells'`` is small: cells, shared by layers, and
            attentions. ``'bases'`` is fast for small images and large budgets: kernels that are
            mixed without cells, wherever that pays (``optimize_for_inference_``).
        memory_budget: Bytes that all bases together may take; see there. Only with ``'bases'``.
        batch_size: The only one that convolutions are to take, at least 1; None for any.

    Returns:
        What was optimised; prints as a table. None if the module has no KW layer.

    Raises:
        TypeError: If ``module`` is no ``nn.Module``.
        ValueError: If it is in training mode or itself a KW layer, ``weights`` is neither,
            ``batch_size`` is below 1, there is a ``memory_budget`` for cells, or a KW layer cannot
            be changed: it has forward hooks, an attention that was pruned, quantized or wrapped, or
            is held beside the module tree.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f'module must be an nn.Module, got {module!r}')
    if weights not in WEIGHTS:
        raise ValueError(f'weights must be one of {WEIGHTS}, got {weights!r}')
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f'batch_size must be None or an integer of at least 1, got {batch_size!r}')
    if weights == 'cells' and memory_budget is not None:
        raise ValueError("memory_budget must be None with weights='cells', which need none, "
                         f'got {memory_budget!r}')
    if isinstance(module, (*KW_CONVS, KWLinear, OptimizedConv)):
        raise ValueError('module must contain KW layers, not be one, got a '
                         f'{type(module).__name__}; put it into an nn.Sequential')
    training = [name or type(module).__name__ for name, m in module.named_modules() if m.training]
    if training:
        raise ValueError('module must be in evaluation mode, for which eval() is called, but '
                         f'{_some(training)} are in training mode')
    if not any(isinstance(m, (*KW_CONVS, OptimizedConv)) for m in module.modules()):
        return None
    fixed = [name for name, m in module.named_modules()
             if isinstance(m, (KWLinear, OptimizedConv)) and has_hooks(m)]
    fixed = find_fixed(module) + fixed
    if fixed:
        raise ValueError('every KW layer must be free of forward hooks, have an attention as it '
                         'was built and be held by the module tree alone, but '
                         f'{_some(fixed)} cannot be changed for export')
    report = optimize_for_inference_(module, 0 if weights == 'cells' else memory_budget)
    # Linear layers are matrix products, whatever the batch size.
    linears: dict[nn.Module, Any] = {layer.conv: layer for layer in module.modules()
                                     if isinstance(layer, KWLinear)}
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in module.modules():
        if isinstance(layer, OptimizedConv):
            is_inside = layer in linears
            made = ExportConv(layer, None if is_inside else batch_size)
            replacements[layer] = made
            if is_inside:
                replacements[linears[layer]] = ExportLinear(made)
    swap_(module, replacements)
    for layer in replacements.values():
        if isinstance(layer, ExportConv) and layer.bases is None:
            # Optimised, they are in an order of their own, and may be stored in less precision.
            cells = layer.cells
            cells.data = cells.data.to(layer.attention.weight.dtype).contiguous()
    return report


def _some(names: list[str]) -> str:
    """The first few names of a list."""
    more = len(names) - 3
    return ', '.join(map(repr, names[:3])) + (f' and {more} more' if more > 0 else '')
