"""Models for OpenMMLab."""
from .backbones import KWConvNeXt, KWMobileNetV2, KWResNet
from .converted import KWConverted
from .official import ConversionReport, convert_official_checkpoint, to_official_checkpoint
from .separate_randomness import WithOwnRandomNumbers
from .static_weights import StaticPretrained, static_checkpoint_to_kw

__all__ = ['ConversionReport', 'KWConvNeXt', 'KWConverted', 'KWMobileNetV2', 'KWResNet',
           'StaticPretrained', 'WithOwnRandomNumbers', 'convert_official_checkpoint',
           'static_checkpoint_to_kw', 'to_official_checkpoint']
