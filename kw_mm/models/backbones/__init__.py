"""Backbones of the paper."""
from .resnet import KWResNet

__all__ = ['KWResNet']
