"""Finds the stage of a layer from the module tree alone."""
from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd

MODULE_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Networks have at most so many stages, because each halves the resolution.
MAX_STAGES = 6


def find_stage(name: str, modules: Mapping[str, nn.Module]) -> str:
    """The path of the stage that a layer belongs to.

    The first name on the path that ends in a digit decides. A module such as ``layer1``, ``stage2``
    or ``denseblock3`` is a stage if it has two layers or more, unless it contains such stages
    itself (``resnet50.layer1``). For an entry of a list (``stages.0``, ``lateral_convs.0``), the
    entry is a stage if it consists of blocks, which means that it, or a child of it, is a list with
    an entry of two layers or more; otherwise the whole list is the stage. More than ``MAX_STAGES``
    modules of the same type that differ only in their number (``layer1`` to ``layer15``) and are
    not made of blocks count as such a list. If no name decides, the stage is the layer's parent.

    Args:
        name: The layer's path.
        modules: All modules by their paths.
    """
    parts = name.split('.')
    for depth, part in enumerate(parts[:-1], 1):
        path = '.'.join(parts[:depth])
        if part.isdigit():
            return path if _is_made_of_blocks(modules[path]) else '.'.join(parts[:depth - 1])
        if _is_numbered_block(part, modules[path], modules['.'.join(parts[:depth - 1])]):
            return '.'.join(parts[:depth - 1])
        if part[-1].isdigit() and num_layers(modules[path]) > 1 and not any(
                child[-1].isdigit() and not child.isdigit() and _lists_blocks(inner)
                for child, inner in modules[path].named_children()):
            return path
    return '.'.join(parts[:-1])


def _is_numbered_block(name: str, module: nn.Module, parent: nn.Module) -> bool:
    """Whether a module is one of so many with the same type and stem that they are blocks."""
    stem = name.rstrip('0123456789')
    alike = [other for other, child in parent.named_children()
             if other.rstrip('0123456789') == stem and type(child) is type(module)]
    return (len(alike) > MAX_STAGES and name != stem and num_layers(module) > 1
            and not _is_made_of_blocks(module))


def num_layers(module: nn.Module) -> int:
    """Convolutions and linear layers inside a module, itself included."""
    return sum(isinstance(m, (_ConvNd, nn.Linear)) for m in module.modules())


def _is_made_of_blocks(entry: nn.Module) -> bool:
    return _lists_blocks(entry) or any(map(_lists_blocks, entry.children()))


def _lists_blocks(module: nn.Module) -> bool:
    return isinstance(module, MODULE_LISTS) and any(num_layers(m) > 1 for m in module.children())
