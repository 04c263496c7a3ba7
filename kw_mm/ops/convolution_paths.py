"""The ways to convolve each sample with its own kernel.

All give the same result and have the same arguments: those of ``dynamic_conv``, and whether the map
is channels-last. Which one is fast depends on device and sizes; ``convolution`` chooses.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch


def is_channels_last(x: Tensor) -> bool:
    """Whether a map is channels-last, and not contiguous as well."""
    return not x.is_contiguous() and x.stride(1) == 1


def in_order(y: Tensor, channels_last: bool) -> Tensor:
    """The same map, channels-last or else contiguous."""
    if not channels_last:
        return y.contiguous()
    by_position = y.movedim(1, -1)
    if by_position.is_contiguous():
        return y
    return by_position.contiguous().movedim(-1, 1)


def output_size(size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
                padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """The spatial size of a convolution's output."""
    return [(s + 2 * p - d * (k - 1) - 1) // step + 1
            for s, k, step, p, d in zip(size, kernel_size, stride, padding, dilation)]


def none(x: Tensor, kernel: Tensor, bias: Tensor | None, _: bool, *args: object) -> Tensor:
    """No sample: the empty sum keeps every parameter in the graph, so that each gets the (zero)
    gradient that distributed training waits for."""
    return _conv(x)(x, kernel.sum(0), bias, *args)


def one(x: Tensor, kernel: Tensor, bias: Tensor | None, channels_last: bool,
         *args: object) -> Tensor:
    """One sample: a convolution like any other."""
    return _conv(x)(x, _weight(kernel[0], channels_last), bias, *args)


def pointwise(x: Tensor, kernel: Tensor, bias: Tensor | None, channels_last: bool,
              stride: Sequence[int], *_: object) -> Tensor:
    """1x1 kernels: one batched matrix product."""
    steps: list[Any] = [slice(None, None, step) for step in stride]
    x = x[(..., *steps)]
    return _product(kernel, x.flatten(2), bias, channels_last).unflatten(2, x.shape[2:])


def im2col(x: Tensor, kernel: Tensor, bias: Tensor | None, channels_last: bool,
           stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
           _: int) -> Tensor:
    """2-d, no groups: one batched matrix product with the inputs of each position."""
    size = output_size(x.shape[2:], kernel.shape[3:], stride, padding, dilation)
    columns = F.unfold(x, kernel.shape[3:], tuple(dilation), tuple(padding), tuple(stride))
    if not kernel.is_contiguous():
        # The columns are reordered, because the kernels are larger.
        columns = columns.unflatten(1, (kernel.shape[2], -1)).transpose(1, 2).flatten(1, 2)
        kernel = kernel.flatten(3).transpose(2, 3)
    return _product(kernel, columns, bias, channels_last).unflatten(2, size)


def rows(x: Tensor, kernel: Tensor, bias: Tensor | None, channels_last: bool,
         stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
         _: int) -> Tensor:
    """No groups: ``im2col`` for channels-last maps, position before channel.

    Such maps, and kernels that are stored position before input channel, are in this order already:
    maps are gathered with one copy, kernels are not copied.
    """
    windows = x.movedim(1, -1)
    if any(padding):
        windows = F.pad(windows, (0, 0, *(side for p in reversed(padding) for side in (p, p))))
    for i, (k, step, d) in enumerate(zip(kernel.shape[3:], stride, dilation)):
        windows = windows.unfold(i + 1, d * (k - 1) + 1, step)[..., ::d]
    # (N, *size, C_in, *k)
    size = windows.shape[1:x.dim() - 1]
    columns = windows.movedim(x.dim() - 1, -1).reshape(len(x), math.prod(size), -1)
    by_position = kernel.flatten(3).transpose(2, 3)
    return _product(by_position, columns.mT, bias, channels_last).unflatten(2, size)


def _product(kernel: Tensor, columns: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    """``(N, C_out, positions)``; channels-last if told to, and where that pays."""
    kernel = kernel.flatten(2)
    # Multiplying the transposed gives the kernels a transposed gradient, which is copied later.
    # With fewer positions than input channels, copying the output is cheaper than that.
    swap = channels_last and (
        not kernel.requires_grad or dispatch.is_recorded() or columns.shape[2] >= columns.shape[1])
    y = torch.bmm(*((columns.mT, kernel.mT) if swap else (kernel, columns)))
    if bias is not None:
        # In place, and before there are views of it, which would have the gradient copied. Under
        # autocast y is in half precision.
        y = y.add_(bias.to(y.dtype) if swap else bias.to(y.dtype).unsqueeze(1))
    return y.transpose(1, 2) if swap else y


def sample_by_sample(x: Tensor, kernel: Tensor, bias: Tensor | None, channels_last: bool,
                     *args: object) -> Tensor:
    """One convolution after the other."""
    conv = _conv(x)
    return torch.cat([conv(sample, _weight(weight, channels_last), bias, *args)
                      for sample, weight in zip(x.split(1), kernel.unbind())])


def grouped(x: Tensor, kernel: Tensor, bias: Tensor | None, _: bool, stride: Sequence[int],
            padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> Tensor:
    """Any geometry: the batch as ``N * groups`` groups of one convolution."""
    num_samples = kernel.shape[0]
    bias = None if bias is None else bias.repeat(num_samples)
    # Contiguous, because samples become channels here.
    y = _conv(x)(x.reshape(1, -1, *x.shape[2:]), _weight(kernel.flatten(0, 1)), bias, stride,
                 padding, dilation, num_samples * groups)
    return y.view(num_samples, -1, *y.shape[2:])


def traced(x: Tensor, kernel: Tensor, bias: Tensor | None, _: bool, stride: Sequence[int],
           padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> Tensor:
    """``grouped`` as one operator: a traced graph would keep the example's number of groups."""
    by_name = isinstance(padding, str)
    return _convolve_samples(x, kernel, bias, stride, () if by_name else padding,
                             padding if by_name else None, dilation, groups)


def _grouped_samples(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Sequence[int],
                     padding: Sequence[int], padding_name: str | None, dilation: Sequence[int],
                     groups: int) -> Tensor:
    return grouped(x, kernel, bias, False, stride, padding_name or padding, dilation, groups)


_convolve_samples = dispatch.register_composite(
    'convolve_samples(Tensor x, Tensor kernel, Tensor? bias, SymInt[] stride, SymInt[] padding, '
    'str? padding_name, SymInt[] dilation, SymInt groups) -> Tensor', _grouped_samples)


def _conv(x: Tensor) -> Callable[..., Tensor]:
    return (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]


def _weight(kernel: Tensor, channels_last: bool = False) -> Tensor:
    """A kernel ``(C_out, C_in / groups, *k)`` with which the output has the input's memory format.

    Torch's convolutions return channels-last maps if the strides of input or kernel look like it.
    """
    if channels_last:
        return kernel
    kernel = kernel.contiguous()
    # A dimension of length 1 may have any stride. These views give it that of a new tensor.
    return kernel.flatten().view(kernel.shape) if 1 in kernel.shape[1:] else kernel
