"""A convolution with a kernel per sample, of operations that every runtime has.

A convolution of ONNX, and of most runtimes, takes its number of groups from the file, so that
``groups = batch`` would fix the batch size for ever. Here the kernel's positions are slices of the
padded input, and what remains is a batched matrix product, in any batch and image size.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def slice_conv(x: Tensor, kernel: Tensor, bias: Tensor | None, kernel_size: Sequence[int],
               stride: Sequence[int], dilation: Sequence[int], groups: int) -> Tensor:
    """Convolves each sample with its own kernel; see ``ops.reference.dynamic_conv``.

    Args:
        x: ``(N, C_in, *spatial)``, padded already; 1 to 3 spatial dimensions.
        kernel: ``(N, C_out, positions, C_in / groups)``, positions row-major.
        bias: ``(C_out,)`` or None.
        kernel_size: One entry for each spatial dimension, as the next two.
        stride: Step between outputs.
        dilation: Spacing of the kernel's positions.
        groups: Convolution groups.

    Returns:
        ``(N, C_out, *spatial)``.
    """
    seen = list(_slices(x, kernel_size, stride, dilation))
    if kernel.shape[3] == 1 and kernel.shape[1] == groups > 1:
        y = _depthwise(seen, kernel)
    else:
        y = _product(seen, kernel, groups)
    return y if bias is None else y + bias.view(-1, *(1,) * len(kernel_size))


def _slices(x: Tensor, kernel_size: Sequence[int], stride: Sequence[int],
            dilation: Sequence[int], dim: int = 2) -> Iterator[Tensor]:
    """What each of the kernel's positions sees, ``(N, C_in, *outputs)``.

    Dimension by dimension: each slice is a copy in a file, and those of one row of the kernel share
    the first. The end of a slice is counted from the end of the map, because then it is a constant.
    """
    if not kernel_size:
        # Plain memory, because whether a slice can be flattened as it lies depends on its size.
        yield x.clone(memory_format=torch.contiguous_format)
        return
    for at in range(kernel_size[0]):
        behind = (kernel_size[0] - 1 - at) * dilation[0]
        part = x[(*(slice(None),) * dim,
                  slice(at * dilation[0], -behind if behind else None, stride[0]))]
        yield from _slices(part, kernel_size[1:], stride[1:], dilation[1:], dim + 1)


def _product(seen: Sequence[Tensor], kernel: Tensor, groups: int) -> Tensor:
    """One batched matrix product with all positions side by side."""
    size = seen[0].shape[2:]
    if groups == 1:
        columns = torch.cat([part.flatten(2) for part in seen], 1)
        return (kernel.flatten(2) @ columns).unflatten(2, size)
    columns = torch.cat([part.flatten(2).unflatten(1, (groups, -1)) for part in seen], 2)
    kernel = kernel.flatten(2).unflatten(1, (groups, -1))
    return (kernel @ columns).flatten(1, 2).unflatten(2, size)


def _depthwise(seen: Sequence[Tensor], kernel: Tensor) -> Tensor:
    """One channel for each group: a product with a number for each position, and their sum."""
    weights = kernel.unflatten(3, (1,) * (seen[0].dim() - 2))
    total: Any = sum(part * weights[:, :, i] for i, part in enumerate(seen))
    return total


def pad(x: Tensor, pads: Sequence[tuple[int, int]], mode: str) -> Tensor:
    """Pads the spatial dimensions, in modes that not every runtime has, by slices of the input.

    Args:
        x: ``(N, C, *spatial)``.
        pads: Positions before and behind, one pair for each spatial dimension.
        mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
    """
    if mode == 'zeros':
        if not any(map(any, pads)):
            return x
        return F.pad(x, [side for pair in reversed(pads) for side in pair])
    for dim, (before, behind) in enumerate(pads, 2):
        x = _pad_dim(x, dim, before, behind, mode)
    return x


def _pad_dim(x: Tensor, dim: int, before: int, behind: int, mode: str) -> Tensor:
    def piece(start: int, stop: int | None) -> Tensor:
        return x[(*(slice(None),) * dim, slice(start, stop))]

    if mode == 'circular':
        first = [piece(-before, None)] if before else []
        last = [piece(0, behind)] if behind else []
    else:
        far = range(1, max(before, behind) + 1) if mode == 'reflect' else [0] * max(before, behind)
        single = [(piece(i, i + 1), piece(-1 - i, -i or None)) for i in far]
        first = [start for start, _ in single[:before][::-1]]
        last = [end for _, end in single[:behind]]
    return torch.cat([*first, x, *last], dim) if first or last else x


def rearrange(x: Tensor, sizes: Sequence[int], order: Sequence[int]) -> Tensor:
    """Permutes dimensions as few as they can be, because runtimes are slow with many.

    Args:
        x: ``(N, product of sizes)``.
        sizes: Into which the second dimension is divided.
        order: Of the dimensions then, counted from 0 for N, which stays the first.

    Returns:
        As ``x``.
    """
    kept = [dim for dim in order[1:] if sizes[dim - 1] > 1]
    # What stays side by side is one dimension.
    runs: list[list[int]] = []
    for dim in kept:
        between = range(runs[-1][-1] + 1, dim) if runs else ()
        if runs and dim > runs[-1][-1] and not any(sizes[i - 1] > 1 for i in between):
            runs[-1].append(dim)
        else:
            runs.append([dim])
    if len(runs) < 2:
        return x
    before = sorted(runs)
    shape = [math.prod(sizes[dim - 1] for dim in run) for run in before]
    return x.unflatten(1, shape).permute(0, *(before.index(run) + 1 for run in runs)).flatten(1)
