"""One kernel per sample: the convolution itself, and the one place that chooses how."""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

# Output positions up to which, on a CPU, im2col and one batched product beat a convolution of
# many groups: kernels then outweigh feature maps. Measured with ResNet18's shapes, 2 cores.
IM2COL_POSITIONS = 256


def dynamic_conv(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Sequence[int],
                 padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> Tensor:
    """Convolves each sample with its own kernel; see ``reference``."""
    num_samples, kernel_size = len(kernel), kernel.shape[3:]
    if num_samples < 2:
        # A convolution like any other. With no sample at all, the empty sum keeps every parameter
        # in the graph: it gets its (zero) gradient, which distributed training waits for.
        conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        single = kernel[0] if num_samples else kernel.sum(0)
        return conv(x, single, bias, stride, padding, dilation, groups)
    is_plain = groups == 1 and not isinstance(padding, str)
    if is_plain and max(kernel_size) == 1 and not any(padding):
        y = _pointwise(x, kernel, stride)
    elif is_plain and x.dim() == 4 and x.device.type == 'cpu' and math.prod(
            _output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    ) <= IM2COL_POSITIONS:
        y = _im2col(x, kernel, stride, padding, dilation)
    else:
        y = _grouped(x, kernel, stride, padding, dilation, groups)
    if bias is None:
        return y
    # Under autocast the products are in half precision, and so is a convolution with its bias.
    return y + bias.to(y.dtype).view(-1, *(1,) * len(kernel_size))


def _pointwise(x: Tensor, kernel: Tensor, stride: Sequence[int]) -> Tensor:
    """1x1 kernels: one batched matrix product."""
    x = x[(..., *(slice(None, None, step) for step in stride))]
    return (kernel.flatten(2) @ x.flatten(2)).unflatten(2, x.shape[2:])


def _im2col(x: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int],
            dilation: Sequence[int]) -> Tensor:
    """2-d, no groups: one batched matrix product for each position of the kernel, added up.

    Assembly leaves kernels in this order, position before channels, so that neither they nor
    their gradients, the largest tensors at hand, are copied.
    """
    num_samples, out_channels, in_channels = kernel.shape[:3]
    weights = kernel.flatten(3).permute(0, 3, 1, 2).reshape(-1, out_channels, in_channels)
    columns = F.unfold(x, kernel.shape[3:], dilation, padding, stride)
    columns = columns.view(num_samples, in_channels, -1, columns.shape[-1]).transpose(1, 2)
    y = (weights @ columns.flatten(0, 1)).unflatten(0, (num_samples, -1)).sum(1)
    return y.unflatten(2, _output_size(x.shape[2:], kernel.shape[3:], stride, padding, dilation))


def _grouped(x: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int] | str,
             dilation: Sequence[int], groups: int) -> Tensor:
    """Any geometry: the batch as ``N * groups`` groups of one convolution."""
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    y = conv(x.reshape(1, -1, *x.shape[2:]), kernel.flatten(0, 1), None, stride, padding, dilation,
             len(kernel) * groups)
    return y.view(*kernel.shape[:2], *y.shape[2:])


def _output_size(size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [(s + 2 * p - d * (k - 1) - 1) // step + 1
            for s, k, step, p, d in zip(size, kernel_size, stride, padding, dilation)]
