"""Finds layers whose size depends on the number of classes, for checkpoints of other classes."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..config_types import all_dicts


def find_class_layers(shapes: Mapping[str, Sequence[int]], state_dict: Mapping[str, Tensor],
                      model: Any) -> list[str]:
    """The keys of a checkpoint whose shapes differ from a model's only by the number of classes.

    Such a tensor is outside of the backbone and differs in its first dimension only, which is ``k``
    times the number of classes, or of classes plus background, with the same ``k`` in checkpoint
    and model. If anything else differs, there are no such keys, and the checkpoint is refused
    later.

    Args:
        shapes: Shapes of the model's static state dict.
        state_dict: State dict of the checkpoint.
        model: The config of the model, which has the numbers of classes.
    """
    classes = {node['num_classes'] for _, node in all_dicts(model)
               if isinstance(node.get('num_classes'), int)}
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
    # All of them must agree on the number of classes in the checkpoint.
    for num in classes:
        if set.intersection(*(_explains(own, given, num) for own, given in sizes.values())):
            return differing
    return []


def _explains(own: int, given: int, num: int) -> set[int]:
    """The numbers of classes in a checkpoint that would explain the size of its tensor."""
    found = set()
    for background in (0, 1):
        factor, rest = divmod(own, num + background)
        if factor and not rest and given % factor == 0:
            found.add(given // factor - background)
    return found
