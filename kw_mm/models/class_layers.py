"""Layers whose outputs count classes, in a checkpoint of other classes than the model's."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor


def find_class_layers(shapes: Mapping[str, Sequence[int]], state_dict: Mapping[str, Tensor],
                      model: Any) -> list[str]:
    """The keys of a checkpoint that differ from a model's for no reason but the number of classes.

    Such a tensor differs in its first dimension alone, outside of the backbone, and that is ``k``
    times the number of classes, or of classes and background, in the checkpoint as in the model.
    What differs otherwise is left to be refused.

    Args:
        shapes: Of the model's static state dict.
        state_dict: The checkpoint's.
        model: The config of the model, which has the numbers of classes.
    """
    classes = set(_num_classes(model))
    differing = [key for key, value in state_dict.items()
                 if key in shapes and tuple(value.shape) != tuple(shapes[key])]
    sizes = {}
    for key in differing:
        own, given = tuple(shapes[key]), tuple(state_dict[key].shape)
        if key.startswith('backbone.') or not own or not given or own[1:] != given[1:]:
            return []
        sizes[key] = (own[0], given[0])
    if not sizes:
        return []
    # The number of classes in the checkpoint with which all of them agree.
    for num in classes:
        if set.intersection(*(_explains(own, given, num) for own, given in sizes.values())):
            return differing
    return []


def _explains(own: int, given: int, num: int) -> set[int]:
    """The numbers of classes in a checkpoint with which its size is what it should be."""
    found = set()
    for background in (0, 1):
        factor, rest = divmod(own, num + background)
        if factor and not rest and given % factor == 0:
            found.add(given // factor - background)
    return found


def _num_classes(cfg: Any) -> Iterator[int]:
    if isinstance(cfg, Mapping):
        if isinstance(cfg.get('num_classes'), int):
            yield cfg['num_classes']
        for value in cfg.values():
            yield from _num_classes(value)
    elif isinstance(cfg, (list, tuple)):
        for value in cfg:
            yield from _num_classes(value)
