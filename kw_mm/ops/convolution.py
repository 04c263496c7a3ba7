"""Convolves each sample with its own kernel; chooses the fastest way to do so."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import convolution_paths as paths
from . import dispatch
from .path_table import LAYOUTS, Case, table_of

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
    channels_last = paths.is_channels_last(x)
    path = choose_path(x, kernel, stride, padding, dilation, groups)
    y = path(x, kernel, bias, channels_last, stride, padding, dilation, groups)
    # This usually copies nothing, because the paths return this order already.
    return paths.in_order(y, channels_last)


def choose_path(x: Tensor, kernel: Tensor, stride: Sequence[int], padding: Sequence[int] | str,
                dilation: Sequence[int], groups: int) -> Callable[..., Tensor]:
    """The function that convolves such tensors fastest: ``path_table`` says which, or for CPUs
    measurements that are kept here.

    A graph that will get other sizes has a path that works for all of them.
    """
    kernel_size = kernel.shape[3:]
    is_plain = groups == 1 and not isinstance(padding, str)
    is_product = max(kernel_size) == 1 and is_plain and not any(padding)
    if torch.jit.is_tracing():
        return paths.pointwise if is_product else paths.traced
    if dispatch.is_exporting():
        # A stride above 1 gives a view, and its size decides whether that can be flattened.
        return paths.pointwise if is_product and max(stride) == 1 else paths.grouped
    num_samples = kernel.shape[0]
    if num_samples == 0:
        return paths.none
    if isinstance(padding, str):
        # Sizes do not matter: such kernels count as grouped ones.
        size: Sequence[int] = x.shape[2:]
    else:
        size = paths.output_size(x.shape[2:], kernel_size, stride, padding, dilation)
    table = table_of(x.device.type)
    if table is None:
        path = _path_on_cpu(x, kernel, math.prod(size), is_plain, is_product)
    else:
        kind = 'pointwise' if is_product else 'dense' if is_plain else 'grouped'
        path = table.choose(Case(kind, num_samples, math.prod(size),
                                 LAYOUTS[paths.is_channels_last(x)], kernel.requires_grad,
                                 x.dim() - 2))
    # Of a single sample there is nothing to group or take apart.
    return paths.one if num_samples == 1 and path in (
        paths.sample_by_sample, paths.grouped) else path


def _path_on_cpu(x: Tensor, kernel: Tensor, positions: int, is_plain: bool,
                 is_product: bool) -> Callable[..., Tensor]:
    num_samples, is_pointwise = kernel.shape[0], max(kernel.shape[3:]) == 1
    if is_product and not (num_samples == 1 and paths.is_channels_last(x)):
        if not _pays_as_convolution(x, kernel, positions):
            return paths.pointwise
        return paths.sample_by_sample
    if is_plain:
        if x.dim() == 4 and not is_pointwise and positions <= IM2COL_POSITIONS and (
                num_samples > 1 or not kernel.is_contiguous()):
            return paths.im2col
        if (num_samples == 1 or positions < GROUPED_POSITIONS or not kernel.requires_grad
                or paths.is_channels_last(x)):
            return paths.sample_by_sample
    return paths.grouped


def _pays_as_convolution(x: Tensor, kernel: Tensor, positions: int) -> bool:
    """Whether 1x1 kernels are faster as convolutions; compilers choose themselves."""
    if (not NARROW_PRODUCTS or kernel.dtype != torch.float32 or paths.is_channels_last(x)
            or dispatch.is_compiling()):
        return False
    num_samples, out_channels, in_channels = kernel.shape[:3]
    return (min(out_channels, in_channels) >= LEAST_CHANNELS
            and out_channels * in_channels * positions >= LEAST_WORK
            and num_samples * out_channels * positions <= MOST_OUTPUTS
            # With fewer positions most of a gradient is that of the kernel: products are faster.
            and (positions >= IM2COL_POSITIONS or not kernel.requires_grad))
