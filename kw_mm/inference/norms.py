"""Finds batch norms that certainly follow a convolution directly."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.surgery import all_paths, hidden_references
from ..layers.conv import has_hooks


def find_norms(root: nn.Module, convs: tuple[type[nn.Module], ...]) -> dict[nn.Module, nn.Module]:
    """Maps convolutions inside a module to the batch norms that directly follow them.

    These pairs are certain: neighbours in an ``nn.Sequential``, convolution and norm of mmcv's
    ``ConvModule`` if its order is that (in both cases only if no subclass changes the forward), and
    what a module returns from ``conv_norm_pairs``. Left out are convolutions and norms that are
    used at several places, that an attribute outside the module tree also refers to, or that have
    hooks, as spectral norm has; and norms without running statistics or that do more than normalise
    (timm's have an activation inside).

    Args:
        root: Where to look.
        convs: The types of convolutions, no subclasses of them.
    """
    paths, hidden = all_paths(root), hidden_references(root)

    def is_single(module: nn.Module) -> bool:
        return len(paths[module]) == 1 and module not in hidden and not has_hooks(module)

    return {conv: norm for parent in root.modules() for conv, norm in _neighbours(parent)
            if type(conv) in convs and isinstance(norm, _BatchNorm)
            and type(norm).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
            and norm.running_mean is not None and is_single(conv) and is_single(norm)}


def _neighbours(parent: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    if hasattr(parent, 'conv_norm_pairs'):
        yield from parent.conv_norm_pairs()
    elif type(parent).forward is nn.Sequential.forward:
        children = list(parent)
        yield from zip(children, children[1:])
    elif _is_conv_module(parent) and parent.order[:2] == ('conv', 'norm') and parent.with_norm:
        yield parent.conv, parent.norm


def _is_conv_module(module: nn.Module) -> bool:
    # By name, because mmcv may not be installed. With efficient_conv_bn_eval it folds the norm
    # itself.
    name = getattr(type(module).forward, '__qualname__', '')
    return name == 'ConvModule.forward' and getattr(
        module, 'efficient_conv_bn_eval_forward', None) is None
