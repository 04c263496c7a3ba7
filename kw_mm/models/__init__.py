"""Models for OpenMMLab."""
from .backbones import KWConvNeXt, KWMobileNetV2, KWResNet

__all__ = ['KWConvNeXt', 'KWMobileNetV2', 'KWResNet']
