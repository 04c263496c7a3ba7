"""Types of mmcv and timm whose forms are known; neither package is imported.

These types differ from a plain convolution in two ways: they pad the input depending on its size
(TensorFlow's 'SAME'), or they standardise the weight, each filter to mean 0 and variance 1.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import FORMS, PlainConv, as_it_stands


class SamePadding(nn.Module):
    """Pads with zeros so that a convolution has ``ceil(size / stride)`` outputs.

    If the number of zeros is odd, there is one more behind the input than before it.

    Args:
        kernel_size: Of the convolution, as the next two; one entry for each spatial dimension.
        stride: Step between its outputs.
        dilation: Spacing of its kernel's positions.
    """

    def __init__(self, kernel_size: Sequence[int], stride: Sequence[int],
                 dilation: Sequence[int]) -> None:
        super().__init__()
        self.extent = tuple(d * (k - 1) + 1 for k, d in zip(kernel_size, dilation))
        self.stride = tuple(stride)

    def forward(self, x: Tensor) -> Tensor:
        """Pads ``(N, C, *spatial)``."""
        pads: list = []
        for size, extent, stride in zip(x.shape[2:], self.extent, self.stride):
            # The last window begins at the last multiple of the stride below size. Comparisons are
            # avoided, so that traced graphs work for inputs of any size.
            total = extent - stride + (-size) % stride
            if extent < stride:
                total = total.clamp(min=0) if isinstance(total, Tensor) else torch.sym_max(total, 0)
            pads = [total // 2, total - total // 2, *pads]
        return F.pad(x, pads)

    def extra_repr(self) -> str:
        return f'extent={self.extent}, stride={self.stride}'


def pad_same(layer: Any, weight: Tensor | None = None) -> PlainConv:
    """The form of a convolution with 'SAME' padding; without ``pad_input`` where that is possible.

    Args:
        layer: The layer.
        weight: Its effective weight, by default its weight.
    """
    weight = layer.weight if weight is None else weight
    totals = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation)]
    if not any(totals):
        return PlainConv.of(layer, weight=weight, padding=0)
    if all(s == 1 for s in layer.stride) and not any(total % 2 for total in totals):
        return PlainConv.of(layer, weight=weight, padding=tuple(t // 2 for t in totals))
    return PlainConv.of(layer, weight=weight, padding=0, pad_input=SamePadding(
        layer.kernel_size, layer.stride, layer.dilation))


def _of_filters(values: Tensor, weight: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (weight.dim() - 1))


def _centred(weight: Tensor) -> Tensor:
    return weight - _of_filters(weight.flatten(1).mean(1), weight)


def mmcv_ws(layer: Any) -> PlainConv:
    """mmcv's ``ConvWS2d``."""
    std = _of_filters(layer.weight.flatten(1).std(1), layer.weight)
    return PlainConv.of(layer, weight=_centred(layer.weight) / (std + layer.eps))


def mmcv_aws(layer: Any) -> PlainConv:
    """mmcv's ``ConvAWS2d``: standardised, then scaled and shifted to pretrained statistics."""
    variance = _of_filters(layer.weight.flatten(1).var(1), layer.weight)
    standardised = _centred(layer.weight) / (variance + 1e-5).sqrt()
    return PlainConv.of(layer, weight=layer.weight_gamma * standardised + layer.weight_beta)


def timm_std(layer: Any) -> PlainConv:
    """timm's four standardised convolutions, with or without scaling and 'SAME' padding."""
    variance = _of_filters(layer.weight.flatten(1).var(1, unbiased=False), layer.weight)
    weight = _centred(layer.weight) * (variance + layer.eps).rsqrt()
    if hasattr(layer, 'gain'):
        weight = weight * (layer.gain * layer.scale)
    return pad_same(layer, weight) if getattr(layer, 'same_pad', False) else PlainConv.of(
        layer, weight=weight)


MMCV = {
    'conv2d_adaptive_padding.Conv2dAdaptivePadding': pad_same,
    'conv_ws.ConvWS2d': mmcv_ws,
    'conv_ws.ConvAWS2d': mmcv_aws,
    # These differ from torch's layers only for empty batches under torch 1.4.
    'wrappers.Conv2d': as_it_stands,
    'wrappers.Conv3d': as_it_stands,
    'wrappers.Linear': as_it_stands,
}
TIMM = {
    'conv2d_same.Conv2dSame': pad_same,
    'std_conv.StdConv2d': timm_std,
    'std_conv.StdConv2dSame': timm_std,
    'std_conv.ScaledStdConv2d': timm_std,
    'std_conv.ScaledStdConv2dSame': timm_std,
    'linear.Linear': as_it_stands,
}

FORMS.update({f'mmcv.cnn.bricks.{path}': form for path, form in MMCV.items()})
# The second path is that of versions before 0.9.
FORMS.update({f'{package}.{path}': form for path, form in TIMM.items()
              for package in ('timm.layers', 'timm.models.layers')})
