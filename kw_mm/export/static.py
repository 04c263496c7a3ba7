"""The ordinary network that a KW one becomes when each layer's kernel is fixed."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.surgery import all_paths, hidden_references, swap_
from ..layers import KWLinear, WarehouseManager
from ..layers.conv import KW_CONVS, has_hooks
from ..layers.mixing import MixingRecord, record_mixing
from ..ops import assemble_kernel, mixing_weights
from ..plan import WarehousePlan
from ..table import format_table

STATIC_TYPES: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@dataclass(frozen=True)
class StaticLayer:
    """What became of a layer.

    Attributes:
        name: Its path in the module.
        num_kernels: Kernels that its own is the mean of; 0 if it is that of the attention's bias.
        spread: How far kernels of single images are from their mean, as a part of its norm (root
            of the mean of squares); NaN without images.
        start_part: The part of the mixing weights that mixtures give to the cell they are tied to
            (see ``MixingRecord.start_part``); NaN without images.
    """

    name: str
    num_kernels: int
    spread: float
    start_part: float = float('nan')


@dataclass(frozen=True)
class StaticReport:
    """What ``to_static_`` did; prints as a table."""

    layers: tuple[StaticLayer, ...]

    def __str__(self) -> str:
        rows = [(layer.name, f'{layer.num_kernels:,}' if layer.num_kernels else 'bias',
                 *(f'{value:.3f}' if value == value else '-'
                   for value in (layer.start_part, layer.spread))) for layer in self.layers]
        return format_table(('layer', 'mean of', "start's part", 'spread'), rows,
                            right=(1, 2, 3))


@torch.no_grad()
def to_static_(module: nn.Module, images: Iterable[Any] | None = None) -> StaticReport:
    """Replaces each KW layer, in place, by an ordinary one whose kernel is fixed.

    That is the mean of the kernels that the layer uses for given images, at the temperature that
    the model has. Since a kernel is linear in its mixing weights, it is the kernel of their mean.
    Without images it is the kernel of the attention's bias (of a hidden vector of zeros), which
    after a static start is the static kernel again. Layers that the images do not reach, as
    those behind a backbone's last output, get that one too.

    What is left has no trace of KW: its state dict is that of the same network with ordinary
    layers, and whatever takes an ordinary network takes it, to quantise, prune or compile it. It
    computes the same for all images, so outputs are no longer those of the KW network.

    Args:
        module: In evaluation mode, with KW layers inside that are not optimised.
        images: Batches, one after the other, on which the module is called: with a tensor or a
            tuple of arguments as ``module(...)``, with a dict as ``module.test_step(...)``.

    Returns:
        How each kernel came about; prints as a table.

    Raises:
        ValueError: If the module is in training mode, has no KW layer, is itself one, or has one
            that is optimised, has hooks or is also held beside the module tree; or if there is no
            image in ``images``.
    """
    if isinstance(module, (*KW_CONVS, KWLinear)):
        raise ValueError('module must contain KW layers, not be one, got a '
                         f'{type(module).__name__}; put it into an nn.Sequential')
    if module.training:
        raise ValueError('module must be in evaluation mode, got one in training mode; call eval()')
    convs = {conv: paths[0] for conv, paths in all_paths(module).items()
             if isinstance(conv, KW_CONVS)}
    if not convs:
        raise ValueError('module must contain KW layers as they are trained, got a '
                         f'{type(module).__name__} without any')
    held = hidden_references(module)
    fixed = [path for conv, path in convs.items()
             if conv in held or has_hooks(conv)]
    if fixed:
        raise ValueError('KW layers must be free of forward hooks and held by the module tree '
                         f'alone, but {fixed[0]!r} is not')
    seen = {} if images is None else _watch(module, list(convs), images)
    layers: list[StaticLayer] = []
    replacements: dict[nn.Module, nn.Module] = {}
    for conv, path in convs.items():
        alpha, weights = _bias_weights(conv), seen.get(conv)
        if weights is not None:
            alpha = weights.mean
        weight = assemble_kernel(alpha[None].to(conv.cells.dtype), conv.cells, conv.plan.grid,
                                 conv.kernel_size)[0]
        layers.append(StaticLayer(path, 0, float('nan')) if weights is None else StaticLayer(
            path, weights.count, weights.spread(conv.cells), weights.start_part(conv.plan)))
        replacements[conv] = _static_conv(conv, weight)
    for layer in module.modules():
        if isinstance(layer, KWLinear):
            replacements[layer] = _static_linear(layer, replacements.pop(layer.conv))
    swap_(module, replacements)
    _drop_managers_(module)
    return StaticReport(tuple(layers))


def _watch(module: Any, convs: list[Any], images: Iterable[Any]) -> dict[nn.Module, MixingRecord]:
    """The mixing weights of layers while a module sees images."""
    num_batches = 0
    with record_mixing(convs) as seen:
        for batch in images:
            num_batches += 1
            if isinstance(batch, Mapping):
                module.test_step(batch)
            elif isinstance(batch, tuple):
                module(*batch)
            else:
                module(batch)
    if not num_batches:
        raise ValueError('images must hold at least one batch, got none')
    return {conv: weights for conv, weights in seen.items() if weights.count}


def _bias_weights(conv: Any) -> Tensor:
    """The mixing weights ``(m, n)`` of a hidden vector of zeros."""
    attention = conv.attention
    hidden = attention.beta.new_zeros(1, conv.plan.hidden)
    return mixing_weights(attention.logits(hidden), attention.beta, attention.tau)[0]


def _static_conv(conv: Any, weight: Tensor) -> nn.Module:
    made = STATIC_TYPES[conv.num_dims](
        conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,
        conv.dilation, conv.groups, conv.bias is not None, conv.padding_mode, weight.device,
        weight.dtype)
    made.weight.copy_(weight)
    if conv.bias is not None:
        made.bias.copy_(conv.bias)
    made.eval()
    if conv.pad_input is None:
        return made
    padded = nn.Sequential(conv.pad_input, made)
    return padded.eval()


def _static_linear(linear: KWLinear, conv: Any) -> nn.Linear:
    made = nn.Linear(linear.in_features, linear.out_features, conv.bias is not None,
                     conv.weight.device, conv.weight.dtype)
    made.weight.copy_(conv.weight.flatten(1))
    if conv.bias is not None:
        made.bias.copy_(conv.bias)
    return made.eval()


def _drop_managers_(module: nn.Module) -> None:
    """Takes away the owners of cells that no layer uses any more."""
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if not isinstance(child, WarehouseManager):
                continue
            # A KW backbone says what its plan is: with no layer it has none.
            if hasattr(type(parent), 'plan'):
                setattr(parent, name, WarehouseManager(WarehousePlan(())).eval())
            else:
                delattr(parent, name)
