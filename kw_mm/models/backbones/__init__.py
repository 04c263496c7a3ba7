"""Backbones of the paper."""
from .convnext import KWConvNeXt
from .mobilenet_v2 import KWMobileNetV2
from .resnet import KWResNet

__all__ = ['KWConvNeXt', 'KWMobileNetV2', 'KWResNet']
