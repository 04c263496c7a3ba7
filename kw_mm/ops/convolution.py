"""Convolves each sample with its own kernel; chooses the fastest way to do so."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch

# Both bounds count output positions and hold for CPUs; they were measured with ResNet50's shapes on
# two cores (docs/performance.md). Up to this one, im2col costs less than the reordering of kernels
# in torch's convolutions.
IM2COL_POSITIONS = 64
# From this one on, training is faster with one grouped convolution, because convolutions of single
# samples copy gradients. A grouped one copies channels-last feature maps.
GROUPED_POSITIONS = 1024


def _has_narrow_products() -> bool:
    """Whether torch multiplies matrices with narrower instructions than it convolves with.

    oneDNN, which convolves, uses AVX-512 wherever there is such; MKL, which multiplies, on Intel's
    processors alone.
    """
    if not (torch.backends.cpu.get_cpu_capability() == 'AVX512'
            and torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    try:
        with Path('/proc/cpuinfo').open() as lines:
            # The first processor's will do: a large machine's file takes long to read.
            vendor = next((line for line in lines if line.startswith('vendor_id')), '')
            return 'AuthenticAMD' in vendor
    except OSError:
        return False


# There 1x1 kernels are faster as convolutions, if they are not small, and if their maps are not so
# large that bringing them into oneDNN's order and back costs more.
NARROW_PRODUCTS = _has_narrow_products()
LEAST_CHANNELS = 64
LEAST_WORK = 2**24      # multiply-adds of a sample
MOST_OUTPUTS = 2**22    # of all samples


def dynamic_conv(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Sequence[int],
                 padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> Tensor:
    """Convolves each sample with its own kernel; see ``reference``.

    The output is contiguous for a contiguous ``x`` and channels-last for a channels-last one, in
    one to three dimensions, whatever the strides of the kernels. Kernels are read fastest if they
    are contiguous, or stored position before input channel.
    """
    channels_last = is_channels_last(x)
    path = choose_path(x, kernel, stride, padding, dilation, groups)
    y = path(x, kernel, bias, channels_last, stride, padding, dilation, groups)
    # This usually copies nothing, because the paths return this order already.
    return in_order(y, channels_last)


def is_channels_last(x: Tensor) -> bool:
    """Whether a map is channels-last, and not contiguous as well."""
    return not x.is_contiguous() and x.stride(1) == 1


def in_order(y: Tensor, channels_last: bool) -> Tensor:
    """The same map, channels-last or else contiguous."""
    if not channels_last:
        return y.contiguous()
    rows = y.movedim(1, -1)
    return y if rows.is_contiguous() else rows.contiguous().movedim(-1, 1)


def choose_path(x: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int] | str,
                dilation: Sequence[int], groups: int) -> Callable[..., Tensor]:
    """The function that convolves such tensors fastest, according to measurements.

    A graph that will get other sizes has a path that works for all of them.
    """
    kernel_size = kernel.shape[3:]
    is_pointwise = max(kernel_size) == 1
    is_plain = groups == 1 and not isinstance(padding, str)
    is_product = is_pointwise and is_plain and not any(padding)
    if torch.jit.is_tracing():
        return _pointwise if is_product else _traced
    if _is_exporting():
        # A stride above 1 gives a view, and its size decides whether that can be flattened.
        return _pointwise if is_product and max(stride) == 1 else _grouped
    num_samples = kernel.shape[0]
    if num_samples == 0:
        return _none
    if is_product and not (num_samples == 1 and is_channels_last(x)):
        if not _pays_as_convolution(x, kernel, stride):
            return _pointwise
        return _sample_by_sample if num_samples > 1 else _one
    if x.device.type == 'cpu' and groups == 1 and not isinstance(padding, str):
        positions = math.prod(_output_size(x.shape[2:], kernel_size, stride, padding, dilation))
        if x.dim() == 4 and not is_pointwise and positions <= IM2COL_POSITIONS and (
                num_samples > 1 or not kernel.is_contiguous()):
            return _im2col
        if num_samples > 1 and (positions < GROUPED_POSITIONS or not kernel.requires_grad
                                or is_channels_last(x)):
            return _sample_by_sample
    return _grouped if num_samples > 1 else _one


def _pays_as_convolution(x: Tensor, kernel: Tensor, stride: Sequence[int]) -> bool:
    """Whether 1x1 kernels are faster as convolutions; compilers choose themselves."""
    if (not NARROW_PRODUCTS or x.device.type != 'cpu' or kernel.dtype != torch.float32
            or is_channels_last(x) or dispatch.is_compiling()):
        return False
    num_samples, out_channels, in_channels = kernel.shape[:3]
    positions = math.prod(-(-size // step) for size, step in zip(x.shape[2:], stride))
    return (min(out_channels, in_channels) >= LEAST_CHANNELS
            and out_channels * in_channels * positions >= LEAST_WORK
            and num_samples * out_channels * positions <= MOST_OUTPUTS
            # With fewer positions most of a gradient is that of the kernel: products are faster.
            and (positions >= IM2COL_POSITIONS or not kernel.requires_grad))


def _is_recorded() -> bool:
    """Whether this call is recorded in a graph that will get tensors of other sizes."""
    return torch.jit.is_tracing() or _is_exporting()


# Older versions of torch do not tell. They export the path that the example takes.
_is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)


def _none(x: Tensor, kernel: Tensor, bias: Tensor | None, _: bool, *args: object) -> Tensor:
    """No sample: the empty sum keeps every parameter in the graph, so that each gets the (zero)
    gradient that distributed training waits for."""
    return _conv(x)(x, kernel.sum(0), bias, *args)


def _one(x: Tensor, kernel: Tensor, bias: Tensor | None, channels_last: bool,
         *args: object) -> Tensor:
    """One sample: a convolution like any other."""
    return _conv(x)(x, _weight(kernel[0], channels_last), bias, *args)


def _pointwise(x: Tensor, kernel: Tensor, bias: Tensor | None, channels_last: bool,
               stride: Sequence[int], *_: object) -> Tensor:
    """1x1 kernels: one batched matrix product."""
    steps: list[Any] = [slice(None, None, step) for step in stride]
    x = x[(..., *steps)]
    return _product(kernel, x.flatten(2), bias, channels_last).unflatten(2, x.shape[2:])


def _im2col(x: Tensor, kernel: Tensor, bias: Tensor | None, channels_last: bool,
            stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int],
            _: int) -> Tensor:
    """2-d, no groups: one batched matrix product with the inputs of each position."""
    size = _output_size(x.shape[2:], kernel.shape[3:], stride, padding, dilation)
    columns = F.unfold(x, kernel.shape[3:], tuple(dilation), tuple(padding), tuple(stride))
    if not kernel.is_contiguous():
        # The columns are reordered, because the kernels are larger.
        columns = columns.unflatten(1, (kernel.shape[2], -1)).transpose(1, 2).flatten(1, 2)
        kernel = kernel.flatten(3).transpose(2, 3)
    return _product(kernel, columns, bias, channels_last).unflatten(2, size)


def _product(kernel: Tensor, columns: Tensor, bias: Tensor | None, channels_last: bool) -> Tensor:
    """``(N, C_out, positions)``; channels-last if told to, and where that pays."""
    kernel = kernel.flatten(2)
    # Multiplying the transposed gives the kernels a transposed gradient, which is copied later.
    # With fewer positions than input channels, copying the output is cheaper than that.
    swap = channels_last and (
        not kernel.requires_grad or _is_recorded() or columns.shape[2] >= columns.shape[1])
    y = torch.bmm(*((columns.mT, kernel.mT) if swap else (kernel, columns)))
    if bias is not None:
        # In place, and before there are views of it, which would have the gradient copied. Under
        # autocast y is in half precision.
        y = y.add_(bias.to(y.dtype) if swap else bias.to(y.dtype).unsqueeze(1))
    return y.transpose(1, 2) if swap else y


def _sample_by_sample(x: Tensor, kernel: Tensor, bias: Tensor | None, channels_last: bool,
                      *args: object) -> Tensor:
    """One convolution after the other."""
    conv = _conv(x)
    return torch.cat([conv(sample, _weight(weight, channels_last), bias, *args)
                      for sample, weight in zip(x.split(1), kernel.unbind())])


def _grouped(x: Tensor, kernel: Tensor, bias: Tensor | None, _: bool, stride: Sequence[int],
             padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> Tensor:
    """Any geometry: the batch as ``N * groups`` groups of one convolution."""
    num_samples = kernel.shape[0]
    bias = None if bias is None else bias.repeat(num_samples)
    # Contiguous, because samples become channels here.
    y = _conv(x)(x.reshape(1, -1, *x.shape[2:]), _weight(kernel.flatten(0, 1)), bias, stride,
                 padding, dilation, num_samples * groups)
    return y.view(num_samples, -1, *y.shape[2:])


def _traced(x: Tensor, kernel: Tensor, bias: Tensor | None, _: bool, stride: Sequence[int],
            padding: Sequence[int] | str, dilation: Sequence[int], groups: int) -> Tensor:
    """``_grouped`` as one operator: a traced graph would keep the example's number of groups."""
    by_name = isinstance(padding, str)
    return _convolve_samples(x, kernel, bias, stride, () if by_name else padding,
                             padding if by_name else None, dilation, groups)


def _grouped_samples(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: Sequence[int],
                     padding: Sequence[int], padding_name: str | None, dilation: Sequence[int],
                     groups: int) -> Tensor:
    return _grouped(x, kernel, bias, False, stride, padding_name or padding, dilation, groups)


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


def _output_size(size: Sequence[int], kernel_size: Sequence[int], stride: Sequence[int],
                 padding: Sequence[int], dilation: Sequence[int]) -> list[int]:
    return [(s + 2 * p - d * (k - 1) - 1) // step + 1
            for s, k, step, p, d in zip(size, kernel_size, stride, padding, dilation)]
