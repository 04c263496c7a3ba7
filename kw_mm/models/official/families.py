"""What tells the checkpoints of the three kinds of backbone from each other."""
from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Callable

import torch

from ...config import WarehouseConfig
from ..backbones import KWConvNeXt, KWMobileNetV2, KWResNet
from ..backbones.base import KWBackbone
from ..backbones.mobilenet_v2 import ROWS, make_divisible
from ..backbones.resnet import bottleneck_convs
from .infer import Shapes


@dataclass(frozen=True)
class Family:
    """What tells the checkpoints of a kind of backbone from others.

    Attributes:
        name: In messages.
        backbone: The class.
        markers: Starts of keys that no other family has.
        heads: Starts of the classifier's keys, which a backbone has not.
        outline: From shapes the arguments that give its size.
        structures: From the outline and shapes those and what else but ``kw_cfg`` may fit.
        output_norms: Pattern of the keys of norms that backbones have and classifiers have not.
    """

    name: str
    backbone: type[KWBackbone]
    markers: tuple[str, ...]
    heads: tuple[str, ...]
    outline: Callable[[Shapes], dict[str, Any]]
    structures: Callable[[dict[str, Any], Shapes], Iterable[dict[str, Any]]] = (
        lambda outline, shapes: [outline])
    output_norms: re.Pattern | None = None

    @property
    def type(self) -> str:
        """The class in a config."""
        return self.backbone.__name__

    @property
    def attn_norm(self) -> str:
        """The backbone's default."""
        return self.backbone.kw_defaults.get('attn_norm', WarehouseConfig().attn_norm)

    def build(self, config: Mapping[str, Any]) -> KWBackbone:
        """Builds the backbone of a config without memory for its tensors."""
        with torch.device('meta'):
            return self.backbone(**{k: v for k, v in config.items() if k != 'type'})

    def is_head(self, key: str, shape: tuple[int, ...]) -> bool:
        """Tells whether an entry that a backbone has not belongs to the classifier.

        A dynamic classifier has a warehouse among those of the backbone. Its cells have one
        spatial dimension, being those of a linear layer (method, section 4).
        """
        return key.startswith(self.heads) or (
            key.startswith('warehouse_manager.weights.') and len(shape) == 4)


def _resnet_outline(shapes: Shapes) -> dict[str, Any]:
    blocks = [_count_blocks(shapes, f'layer{stage}.') for stage in range(1, 5)]
    bottleneck = 2 * sum('.bn3.weight' in key for key in shapes) > sum(blocks)
    width = _most_common((shape[0] >> int(key[5]) - 1 for key, shape in shapes.items()
                          if re.fullmatch(r'layer[1-4]\.\d+\.bn1\.weight', key) and shape), 64)
    distances = {depth: sum(abs(a - b) for a, b in zip(counts, blocks))
                 for depth, (convs, counts) in KWResNet.arch_settings.items()
                 if (convs is bottleneck_convs) == bottleneck}
    outline = dict(depth=min(distances, key=distances.get))
    return outline if width == 64 else dict(outline, base_channels=width)


def _convnext_outline(shapes: Shapes) -> dict[str, Any]:
    depths, channels = [], [48]
    for stage in range(4):
        depths.append(max(_count_blocks(shapes, f'stages.{stage}.'), 1))
        channels.append(_most_common(
            (shape[0] for key, shape in shapes.items()
             if re.fullmatch(rf'stages\.{stage}\.\d+\.norm\.weight', key) and shape),
            2 * channels[-1]))
    arch = dict(depths=tuple(depths), channels=tuple(channels[1:]))
    return dict(arch=next((name for name, sizes in KWConvNeXt.arch_settings.items()
                           if sizes == arch), arch))


def _mobilenet_outline(shapes: Shapes) -> dict[str, Any]:
    def matches(width: float) -> int:
        return sum(shapes.get(key) == (make_divisible(channels * width),)
                   for key, channels in norms.items())

    widths = [channels for _, channels, num_blocks, _, _ in ROWS for _ in range(num_blocks)]
    norms = {f'features.{i}.conv.{3 if i > 1 else 2}.weight': channels
             for i, channels in enumerate(widths, 1)}
    return dict(widen_factor=max((1.0, 0.5, *(i / 20 for i in range(2, 41))), key=matches))


def _mobilenet_structures(outline: dict[str, Any], shapes: Shapes) -> Iterator[dict[str, Any]]:
    dynamic, static = Counter(), Counter()
    for warehouse in FAMILIES['MobileNetV2'].build(outline).plan.warehouses:
        stage, kind = warehouse.key.split('.')
        if kind == 'pwconv':
            for layer in warehouse.layers:
                name = layer.spec.name
                dynamic[stage] += f'{name}.attention.fc1.weight' in shapes
                static[stage] += f'{name}.weight' in shapes
    stages = tuple(int(stage[len('stage'):]) for stage in static if static[stage] > dynamic[stage])
    more = dict(static_pointwise_stages=stages) if stages else {}
    for share in (True, False):
        yield dict(outline, share_pointwise=share, **more)


FAMILIES = {family.name: family for family in (
    Family('ResNet', KWResNet, ('layer1.', 'layer2.', 'layer3.', 'layer4.'), ('fc.',),
           _resnet_outline),
    Family('ConvNeXt', KWConvNeXt, ('downsample_layers.', 'stages.'), ('head.', 'norm.'),
           _convnext_outline, output_norms=re.compile(r'norm\d\.')),
    Family('MobileNetV2', KWMobileNetV2, ('features.',), ('classifier.',), _mobilenet_outline,
           _mobilenet_structures),
)}


def _count_blocks(shapes: Shapes, prefix: str) -> int:
    """How many blocks a stage has; what has but a few keys is none."""
    keys = Counter(key[len(prefix):].split('.')[0] for key in shapes if key.startswith(prefix))
    return sum(2 * count >= max(keys.values()) for count in keys.values())


def _most_common(values: Iterable[int], default: int) -> int:
    counts = Counter(values).most_common(1)
    return counts[0][0] if counts else default
