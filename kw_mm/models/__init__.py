"""Models for OpenMMLab."""
from .backbones import KWConvNeXt, KWMobileNetV2, KWResNet
from .official import ConversionReport, convert_official_checkpoint, to_official_checkpoint

__all__ = ['ConversionReport', 'KWConvNeXt', 'KWMobileNetV2', 'KWResNet',
           'convert_official_checkpoint', 'to_official_checkpoint']
