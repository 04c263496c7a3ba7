"""Convolutions that compute the same as timm's, with timm's names and paths.

The suite runs without timm.
"""
from __future__ import annotations

import math
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _pad(x: Tensor, layer: nn.Module) -> Tensor:
    pads = []
    for size, k, s, d in zip(x.shape[-2:], layer.kernel_size, layer.stride, layer.dilation):
        total = max((math.ceil(size / s) - 1) * s + (k - 1) * d + 1 - size, 0)
        pads = [total // 2, total - total // 2, *pads]
    return F.pad(x, pads)


class Conv2dSame(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(_pad(x, self), self.weight, self.bias, self.stride, (0, 0), self.dilation,
                        self.groups)


class StdConv2d(nn.Conv2d):
    def __init__(self, *args, bias: bool = False, eps: float = 1e-6, **kwargs) -> None:
        super().__init__(*args, bias=bias, **kwargs)
        self.eps = eps
        self.same_pad = False

    def forward(self, x: Tensor) -> Tensor:
        gain = (self.gain * self.scale).view(-1) if hasattr(self, 'gain') else None
        weight = F.batch_norm(self.weight.reshape(1, self.out_channels, -1), None, None,
                              weight=gain, training=True, momentum=0., eps=self.eps)
        x = _pad(x, self) if self.same_pad else x
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding,
                        self.dilation, self.groups)


class StdConv2dSame(StdConv2d):
    def __init__(self, *args, padding: str = 'SAME', **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.same_pad = True


class ScaledStdConv2d(StdConv2d):
    def __init__(self, *args, bias: bool = True, gamma: float = 1.0, **kwargs) -> None:
        super().__init__(*args, bias=bias, **kwargs)
        self.scale = gamma * self.weight[0].numel() ** -0.5
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))


class ScaledStdConv2dSame(ScaledStdConv2d):
    def __init__(self, *args, padding: str = 'SAME', **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.same_pad = True


PATHS = {Conv2dSame: 'timm.layers.conv2d_same', StdConv2d: 'timm.layers.std_conv',
         StdConv2dSame: 'timm.layers.std_conv', ScaledStdConv2d: 'timm.layers.std_conv',
         ScaledStdConv2dSame: 'timm.layers.std_conv'}
for layer, path in PATHS.items():
    layer.__module__ = path


@contextmanager
def importable() -> Iterator[None]:
    """Lets pickle find them within a context. Other code would take this for the whole timm.
    """
    with pytest.MonkeyPatch.context() as patch:
        for layer, path in PATHS.items():
            parts = path.split('.')
            for depth in range(1, len(parts) + 1):
                name = '.'.join(parts[:depth])
                if name not in sys.modules:
                    patch.setitem(sys.modules, name, types.ModuleType(name))
            patch.setattr(sys.modules[path], layer.__name__, layer, raising=False)
        yield
