"""The only place where our classes are registered with OpenMMLab.

Everything goes into the root registries of mmengine, so that a bare ``type='KWResNet'`` resolves
from MMDetection and MMSegmentation configs alike.
"""
from __future__ import annotations

from mmengine.registry import HOOKS, MODELS, WEIGHT_INITIALIZERS

from .engine.hooks import CONFIG_HOOKS
from .layers import KWConv1d, KWConv2d, KWConv3d, KWLinear
from .models import (
    KWConverted,
    KWConvNeXt,
    KWMobileNetV2,
    KWResNet,
    StaticPretrained,
    WithOwnRandomNumbers,
)


def register_all() -> None:
    """Registers layers, backbones (under the authors' names too), conversion and hooks."""
    for layer in (KWConv1d, KWConv2d, KWConv3d, KWLinear):
        MODELS.register_module(module=layer)
    for backbone in (KWResNet, KWConvNeXt, KWMobileNetV2):
        name = backbone.__name__
        MODELS.register_module(name=[name, name.replace('KW', 'KW_')], module=backbone)
    for builder in (KWConverted, WithOwnRandomNumbers):
        MODELS.register_module(module=builder)
    WEIGHT_INITIALIZERS.register_module(module=StaticPretrained)
    for hook in CONFIG_HOOKS:
        HOOKS.register_module(module=hook)
