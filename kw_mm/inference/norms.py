"""Batch norms that stand right behind a convolution, where that is certain."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..convert.surgery import all_paths, hidden_references


def find_norms(root: nn.Module, convs: tuple[type[nn.Module], ...]) -> dict[nn.Module, nn.Module]:
    """Convolutions inside a module and the batch norm that each is followed by.

    Certain is: neighbours in an ``nn.Sequential``, mmcv's ``ConvModule`` in that order (neither
    with a forward of a subclass), and what a module names in ``conv_norm_pairs``. Convolutions and
    norms with several places, a reference beside the module tree or a hook, as spectral norm has,
    are left out, and so are norms without running statistics and those that do more than
    normalise (timm's, which have an activation inside).

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


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _neighbours(parent: Any) -> Iterator[tuple[nn.Module, nn.Module]]:
    if hasattr(parent, 'conv_norm_pairs'):
        yield from parent.conv_norm_pairs()
    elif type(parent).forward is nn.Sequential.forward:
        children = list(parent)
        yield from zip(children, children[1:])
    elif _is_conv_module(parent) and parent.order[:2] == ('conv', 'norm') and parent.with_norm:
        yield parent.conv, parent.norm


def _is_conv_module(module: nn.Module) -> bool:
    # By name, for mmcv may be missing. Its efficient_conv_bn_eval folds the norm by itself.
    name = getattr(type(module).forward, '__qualname__', '')
    return name == 'ConvModule.forward' and getattr(
        module, 'efficient_conv_bn_eval_forward', None) is None
