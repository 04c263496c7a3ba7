"""A static network with as many parameters as a dynamic one: wider."""
from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import Config

from ...config_types import type_name
from .arms import build_model, count_parameters

# The option that scales a backbone's channels, its default, and its smallest step.
_WIDTHS: dict[str, tuple[str, float, float]] = {
    'ResNet': ('base_channels', 64, 1), 'KWResNet': ('base_channels', 64, 1),
    'MobileNetV2': ('widen_factor', 1.0, 0.01), 'KWMobileNetV2': ('widen_factor', 1.0, 0.01)}


def widen(static: Config, num_parameters: int) -> Config:
    """The static config with a backbone so wide that the model has so many parameters.

    Args:
        static: Config of a model with a static backbone and a neck that is told its channels.
        num_parameters: Of the whole model.

    Returns:
        A copy; the step of the width decides how close it gets.

    Raises:
        ValueError: If the backbone has no width that is known here or starts from weights, which
            fit no other width, if the neck has no ``in_channels``, or if no width is wide enough.
    """
    backbone = static.model.backbone
    kind = type_name(backbone)
    if kind not in _WIDTHS:
        raise ValueError(f'the backbone of a wider network must be one of {sorted(_WIDTHS)}, '
                         f'got {kind}')
    start = backbone.get('init_cfg') or static.get('load_from')
    if start:
        raise ValueError(f'a wider network cannot start from weights of this width: {start}')
    if 'in_channels' not in (static.model.get('neck') or {}):
        raise ValueError('the neck of a wider network must have in_channels')
    option, default, step = _WIDTHS[kind]
    narrowest = round(backbone.get(option, default) / step)

    def at(steps: int) -> Config:
        cfg = copy.deepcopy(static)
        cfg.model.backbone[option] = round(steps * step, 6)
        cfg.model.neck.in_channels = _channels(cfg)
        return cfg

    def count(steps: int) -> int:
        return count_parameters(build_model(at(steps)))

    steps = _nearest(count, num_parameters, narrowest)
    if steps == narrowest:
        raise ValueError(f'the static network has {count(narrowest):,} parameters, and no wider '
                         f'one is closer to {num_parameters:,}')
    return at(steps)


def _channels(cfg: Config) -> list[int]:
    only_backbone = Config(dict(model=cfg.model.backbone, default_scope=cfg.get('default_scope')),
                           filename=cfg.filename)
    with torch.no_grad():
        maps: Any = build_model(only_backbone).eval()(torch.zeros(1, 3, 64, 64))
    return [x.shape[1] for x in maps]


def _nearest(count: Callable[[int], int], wanted: int, low: int) -> int:
    """The number of steps, at least ``low``, with a count as close to what is wanted as can be."""
    high = low + 1
    while count(high) < wanted:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < wanted else (low, middle)
    return min((low, high), key=lambda steps: abs(count(steps) - wanted))
