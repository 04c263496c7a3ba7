"""One kernel per sample: the convolution itself, and the one place that chooses how."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Bounds of output positions, on a CPU; measured with ResNet50's shapes on 2 cores, see
# docs/performance.md. Up to the first the kernels outweigh the feature maps by so much that
# bringing them into a convolution's own order costs more than im2col does.
IM2COL_POSITIONS = 64
# From here on a step of training is faster with one grouped convolution, which is spared the
# copies of gradients that samples one by one have.
GROUPED_POSITIONS = 1024


def dynamic_conv(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Sequence[int],
                 padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> Tensor:
    """Convolves each sample with its own kernel; see ``reference``.

    Kernels may lie in memory as they are indexed, or position before input channel as channels-
    last feature maps want them.
    """
    path = choose_path(x, kernel, stride, padding, dilation, groups)
    return path(x, kernel, bias, stride, padding, dilation, groups)


def choose_path(x: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int] | str,
                dilation: Sequence[int], groups: int) -> Callable[..., Tensor]:
    """The function that convolves such tensors fastest, by what was measured."""
    num_samples, kernel_size = len(kernel), kernel.shape[3:]
    if num_samples == 0:
        return _none
    is_pointwise = max(kernel_size) == 1
    is_plain = groups == 1 and not isinstance(padding, str)
    if is_pointwise and is_plain and not any(padding) and num_samples > 1:
        return _pointwise
    if x.device.type == 'cpu' and is_plain:
        positions = math.prod(_output_size(x.shape[2:], kernel_size, stride, padding, dilation))
        if x.dim() == 4 and not is_pointwise and positions <= IM2COL_POSITIONS and (
                num_samples > 1 or not kernel.is_contiguous()):
            return _im2col
        if num_samples > 1 and (positions < GROUPED_POSITIONS or not kernel.requires_grad):
            return _sample_by_sample
    return _grouped if num_samples > 1 else _one


def _none(x: Tensor, kernel: Tensor, bias: Tensor | None, *args: object) -> Tensor:
    """No sample: the empty sum keeps every parameter in the graph, so that each gets the (zero)
    gradient that distributed training waits for."""
    return _conv(x)(x, kernel.sum(0), bias, *args)


def _one(x: Tensor, kernel: Tensor, bias: Tensor | None, *args: object) -> Tensor:
    """One sample: a convolution like any other."""
    return _conv(x)(x, _laid_out_for(x, kernel)[0], bias, *args)


def _pointwise(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Sequence[int],
               *_: object) -> Tensor:
    """1x1 kernels: one batched matrix product."""
    x = x[(..., *(slice(None, None, step) for step in stride))]
    return _product(kernel, x.flatten(2), bias).unflatten(2, x.shape[2:])


def _im2col(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Sequence[int],
            padding: Sequence[int], dilation: Sequence[int], _: int) -> Tensor:
    """2-d, no groups: one batched matrix product with what each position sees."""
    size = _output_size(x.shape[2:], kernel.shape[3:], stride, padding, dilation)
    columns = F.unfold(x, kernel.shape[3:], dilation, padding, stride)
    if not kernel.is_contiguous():
        # Sooner the columns than the kernels, which are larger.
        columns = columns.unflatten(1, (kernel.shape[2], -1)).transpose(1, 2).flatten(1, 2)
        kernel = kernel.flatten(3).transpose(2, 3)
    return _product(kernel, columns, bias).unflatten(2, size)


def _product(kernel: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    y = kernel.flatten(2) @ columns
    # Before anything is a view of it, which would have the gradient copied. Under autocast it is
    # in half precision.
    return y if bias is None else y.add_(bias.to(y.dtype).unsqueeze(1))


def _sample_by_sample(x: Tensor, kernel: Tensor, bias: Tensor | None, *args: object) -> Tensor:
    """One convolution after the other."""
    conv = _conv(x)
    return torch.cat([conv(sample, _laid_out_for(x, weight), bias, *args)
                      for sample, weight in zip(x.split(1), kernel.unbind())])


def _grouped(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Sequence[int],
             padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> Tensor:
    """Any geometry: the batch as ``N * groups`` groups of one convolution."""
    bias = None if bias is None else bias.repeat(len(kernel))
    y = _conv(x)(x.reshape(1, -1, *x.shape[2:]), _laid_out_for(x, kernel).flatten(0, 1), bias,
                 stride, padding, dilation, len(kernel) * groups)
    return y.view(*kernel.shape[:2], *y.shape[2:])


def _conv(x: Tensor) -> Callable[..., Tensor]:
    return (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]


def _laid_out_for(x: Tensor, kernel: Tensor) -> Tensor:
    """Kernels in the memory format of their input, which a convolution would else give up."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return kernel
    return kernel.contiguous()


def _output_size(size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [(s + 2 * p - d * (k - 1) - 1) // step + 1
            for s, k, step, p, d in zip(size, kernel_size, stride, padding, dilation)]
