"""Replaces modules inside a module; knows nothing of KernelWarehouse."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn


def swap_(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replaces modules by others, under the same names.

    A module that is used at several places is replaced at all of them.

    Args:
        root: The module to edit; no key of ``replacements`` itself.
        replacements: The new module for each old one.
    """
    for parent in list(root.modules()):
        # Not named_children, which skips the second place of a shared child.
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def all_paths(root: nn.Module) -> dict[nn.Module, tuple[str, ...]]:
    """Every module inside, the root included, with all paths that lead to it, in module order."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        paths.setdefault(module, []).append(path)
    return {module: tuple(found) for module, found in paths.items()}


def hidden_references(root: nn.Module) -> dict[nn.Module, str]:
    """Modules that an attribute outside the module tree also refers to, with the attribute's path.

    Such an attribute, e.g. a plain list of modules, would keep the old module after a swap.
    """
    found: dict[nn.Module, str] = {}
    for path, module in root.named_modules():
        for name, value in vars(module).items():
            if name not in ('_modules', '_parameters', '_buffers'):
                for held in _modules_in(value):
                    found.setdefault(held, f'{path}.{name}'.lstrip('.'))
    return found


def _modules_in(value: Any) -> Iterator[nn.Module]:
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (list, tuple, set)):
        for entry in value:
            yield from _modules_in(entry)
    elif isinstance(value, dict):
        yield from _modules_in(list(value.values()))
