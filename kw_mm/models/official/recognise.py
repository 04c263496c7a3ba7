"""Finds the backbone that a state dict belongs to, and how the two differ."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmengine.registry import MODELS
from torch import Tensor

from ..backbones import KWConvNeXt, KWMobileNetV2, KWResNet
from ..backbones.base import KWBackbone
from .layout import listed
from .released import RELEASED, ReleasedModel

Shapes = Mapping[str, tuple[int, ...]]


class Family(NamedTuple):
    """A kind of backbone: its name, how its keys start, and how those of its classifier do."""

    name: str
    marker: str
    heads: tuple[str, ...]


FAMILIES: dict[type[KWBackbone], Family] = {
    KWResNet: Family('ResNet', 'layer', ('fc.',)),
    KWConvNeXt: Family('ConvNeXt', 'stages.', ('head.', 'norm.')),
    KWMobileNetV2: Family('MobileNetV2', 'features.', ('classifier.',))}
# Norms of the outputs, which backbones have and classifiers lack.
OUTPUT_NORMS = re.compile(r'norm\d\.')


@dataclass(frozen=True)
class Match:
    """The backbone that a state dict belongs to, and how the two differ.

    Attributes:
        family: The kind of backbone.
        config: Builds it.
        released: The released model, or None if it is another.
        heads: Entries of the classifier.
        absent: Shapes of the output norms, if the state dict has none of them.
        missing: Other missing entries, with the shapes they should have.
        unknown: Entries that the backbone does not have, with their shapes.
        misshapen: Entries of a wrong shape: the shape they have and the one they should have.
    """

    family: str
    config: dict[str, Any]
    released: ReleasedModel | None
    heads: tuple[str, ...]
    absent: dict[str, tuple[int, ...]]
    missing: dict[str, tuple[int, ...]]
    unknown: dict[str, tuple[int, ...]]
    misshapen: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]

    @property
    def num_differences(self) -> int:
        """How many entries differ."""
        return len(self.missing) + len(self.unknown) + len(self.misshapen)

    def describe(self, name: Callable[[str], str]) -> str:
        """The differences in words; ``name`` turns an entry's name into its key in the file."""
        lines = dict(
            missing=[f'{name(k)} {s}' for k, s in self.missing.items()],
            unknown=[f'{name(k)} {s}' for k, s in self.unknown.items()],
            misshapen=[f'{name(k)} {found} instead of {wanted}'
                       for k, (found, wanted) in self.misshapen.items()])
        return '; '.join(f'{kind} {listed(some)}' for kind, some in lines.items() if some)


def recognise(state: Mapping[str, Tensor], name: Callable[[str], str],
              config: Mapping[str, Any] | None = None, may_lack_norms: bool = False) -> Match:
    """Finds the released model whose state dict this is.

    Args:
        state: Entries named as in the backbone, possibly with those of a classifier.
        name: Turns an entry's name into its key in the file, for messages.
        config: The backbone, if it is not one of the released models.
        may_lack_norms: Whether the norms of the backbone's outputs may all be absent.

    Raises:
        ValueError: If it is not the state dict of any of them, or of ``config``.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in state.items()}
    kind = _kind(shapes)
    if config is not None:
        match = _compare(shapes, dict(config), None, may_lack_norms)
        closest, asked = 'this one differs', 'that of the config'
    else:
        match = min((_compare(shapes, model.backbone, model, may_lack_norms) for model in RELEASED
                     if model.backbone['type'] == kind.__name__),
                    key=lambda match: match.num_differences)
        closest = f'this one comes closest to {match.released.name}' if match.released else ''
        asked = ('one of the released models, or named by a config of its own (backbone=..., '
                 '--config CONFIG)')
    if match.num_differences:
        raise ValueError(f'the backbone must be {asked}; {closest}: {match.describe(name)}')
    return match


def _kind(shapes: Shapes) -> type[KWBackbone]:
    """The kind of backbone that most keys fit."""
    counts = {kind: sum(key.startswith(family.marker) for key in shapes)
              for kind, family in FAMILIES.items()}
    kind = max(counts, key=counts.__getitem__)
    if not any(key.startswith('warehouse_manager.') or '.attention.fc' in key for key in shapes):
        what = (f', it looks like a static {FAMILIES[kind].name}' if counts[kind]
                else f': {listed(shapes)}')
        raise ValueError('a KW backbone must have warehouses (warehouse_manager.weights.*) and '
                         f'attentions (*.attention.*), this state dict has none{what}')
    if not counts[kind]:
        raise ValueError(f'a KW backbone must be one of {[f.name for f in FAMILIES.values()]}; no '
                         f'key starts as theirs do, got {listed(shapes)}')
    return kind


def _compare(shapes: Shapes, config: dict[str, Any], released: ReleasedModel | None,
             may_lack_norms: bool) -> Match:
    with torch.device('meta'):  # takes no memory for tensors
        backbone = MODELS.build({key: value for key, value in config.items() if key != 'init_cfg'})
    family = next((family for kind, family in FAMILIES.items() if isinstance(backbone, kind)), None)
    if family is None or not backbone.plan.layers:
        raise ValueError('the config must have one of our KW backbones, '
                         f'{[kind.__name__ for kind in FAMILIES]}, got {config}')
    expected = {key: tuple(value.shape) for key, value in backbone.state_dict().items()}
    absent = {}
    if may_lack_norms and not any(map(OUTPUT_NORMS.match, shapes)):
        absent = {key: shape for key, shape in expected.items() if OUTPUT_NORMS.match(key)}
    # The warehouse of a dynamic classifier is among those of the backbone. Its cells have one
    # spatial dimension, as for a linear layer (method, section 4).
    heads = tuple(key for key, shape in shapes.items() if key not in expected and (
        key.startswith(family.heads)
        or (key.startswith('warehouse_manager.weights.') and len(shape) == 4)))
    return Match(
        family.name, config, released, heads, absent,
        missing={key: shape for key, shape in expected.items()
                 if key not in shapes and key not in absent},
        unknown={key: shape for key, shape in shapes.items()
                 if key not in expected and key not in heads},
        misshapen={key: (shape, expected[key]) for key, shape in shapes.items()
                   if key in expected and shape != expected[key]})
