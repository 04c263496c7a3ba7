"""The one place that hands our classes to OpenMMLab.

Everything goes into the root registries of mmengine, so that a bare ``type='KWResNet'`` resolves
from MMDetection and MMSegmentation configs alike.
"""
from __future__ import annotations

from mmengine.registry import HOOKS, MODELS

from .engine.hooks import KWTemperatureHook, RandomStateHook
from .layers import KWConv1d, KWConv2d, KWConv3d, KWLinear
from .models import KWResNet


def register_all() -> None:
    """Registers layers, backbones (under the authors' names too) and hooks."""
    for layer in (KWConv1d, KWConv2d, KWConv3d, KWLinear):
        MODELS.register_module(module=layer)
    MODELS.register_module(name=['KWResNet', 'KW_ResNet'], module=KWResNet)
    for hook in (KWTemperatureHook, RandomStateHook):
        HOOKS.register_module(module=hook)
