"""Models for OpenMMLab."""
from .backbones import KWResNet

__all__ = ['KWResNet']
