"""Models for OpenMMLab."""
from .backbones import KWConvNeXt, KWMobileNetV2, KWResNet
from .converted import KWConverted
from .static_weights import StaticPretrained, static_checkpoint_to_kw

__all__ = ['KWConvNeXt', 'KWConverted', 'KWMobileNetV2', 'KWResNet', 'StaticPretrained',
           'static_checkpoint_to_kw']
