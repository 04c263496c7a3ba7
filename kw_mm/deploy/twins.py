"""Modules of others that compute something from sizes as numbers of the example.

Each twin computes the same for every size. ``replace_`` puts it into the module's place.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..convert.surgery import swap_
from . import dino


class AdaptiveAvgPool(nn.Module):
    """For ``nn.AdaptiveAvgPool2d`` (PSPNet, UPerNet, DeepLab): means as matrix products.

    ONNX has a pooling to size 1 alone.
    """

    def __init__(self, pool: Any) -> None:
        super().__init__()
        size = pool.output_size
        self.size = (size, size) if isinstance(size, int) else tuple(size)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, *size)`` of ``(N, C, H, W)``."""
        if self.size == (1, 1):
            return x.mean((2, 3), keepdim=True)
        rows = self._means(x.shape[2], self.size[0], x)
        columns = self._means(x.shape[3], self.size[1], x)
        return rows @ x @ columns.T

    @staticmethod
    def _means(length: int, count: int, like: Tensor) -> Tensor:
        """``(count, length)``: bin i is the mean of [floor(i l / c), ceil((i + 1) l / c))."""
        bins = torch.arange(count, device=like.device)
        start = torch.div(bins * length, count, rounding_mode='floor').unsqueeze(1)
        stop = torch.div((bins + 1) * length + count - 1, count,
                         rounding_mode='floor').unsqueeze(1)
        place = torch.arange(length, device=like.device)
        inside = ((place >= start) & (place < stop)).to(like.dtype)
        return inside / inside.sum(1, keepdim=True)


class CornerPadding(nn.Module):
    """For ``AdaptivePadding`` of MMDetection (Swin): what it adds may be nothing."""

    def __init__(self, padding: Any) -> None:
        super().__init__()
        if padding.padding != (('corner',) * 2) and padding.padding != 'corner':
            raise ValueError("AdaptivePadding must have padding='corner' to be exported, got "
                             f'{padding.padding!r}')
        if tuple(padding.stride) != tuple(padding.kernel_size) or max(padding.dilation) > 1:
            raise ValueError('AdaptivePadding must have kernels as large as its strides to be '
                             f'exported, got {padding.kernel_size} and {padding.stride}')
        self.stride = tuple(padding.stride)

    def forward(self, x: Tensor) -> Tensor:
        """Pads ``(N, C, H, W)`` at its right and lower ends."""
        below, right = (-size % step for size, step in zip(x.shape[2:], self.stride))
        return F.pad(x, (0, right, 0, below))


class MergePatches(nn.Module):
    """For ``PatchMerging`` (Swin): 2x2 positions by slices, where MMDetection unfolds."""

    def __init__(self, merging: Any) -> None:
        super().__init__()
        sampler = merging.sampler
        pairs = [value if isinstance(value, tuple) else (value, value) for value in (
            sampler.kernel_size, sampler.stride, sampler.padding, sampler.dilation)]
        if pairs != [(2, 2), (2, 2), (0, 0), (1, 1)] or merging.adap_padding is None:
            raise ValueError('PatchMerging must merge 2x2 positions, adaptively padded, to be '
                             f'exported, got {merging}')
        self.norm, self.reduction = merging.norm, merging.reduction

    def forward(self, x: Tensor, input_size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        """``(N, H * W, C)`` to ``(N, H / 2 * W / 2, C')``, and the new size."""
        height, width = input_size
        x = x.unflatten(1, (height, width))
        x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        parts = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        size = parts[0].shape[1], parts[0].shape[2]
        # Channel by channel, as nn.Unfold has them.
        x = torch.stack(parts, 4).flatten(3).flatten(1, 2)
        if self.norm is not None:
            x = self.norm(x)
        return self.reduction(x), size


class ShiftedWindows(nn.Module):
    """For ``ShiftWindowMSA`` (Swin): windows of maps of any size.

    MMDetection writes the mask region by region, and asks whether there is padding.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.window, self.shift = attention.window_size, attention.shift_size
        self.w_msa, self.drop = attention.w_msa, attention.drop

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """``(N, H * W, C)`` of the same."""
        height, width = hw_shape
        window, shift = self.window, self.shift
        x = query.unflatten(1, (height, width))
        # So that a multiple of the window is seen to be one, for any size.
        rows, columns = (height + window - 1) // window, (width + window - 1) // window
        x = F.pad(x, (0, 0, 0, columns * window - width, 0, rows * window - height))
        if shift:
            x = _roll(_roll(x, shift, 1), shift, 2)
        x = x.unflatten(2, (columns, window)).unflatten(1, (rows, window))
        x = x.transpose(2, 3).flatten(3, 4)  # (N, rows, columns, window * window, C)
        mask = self._mask(rows, columns, x) if shift else None
        x = self._attend(x, mask)
        x = x.unflatten(3, (window, window)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if shift:
            x = _roll(_roll(x, -shift, 1), -shift, 2)
        return self.drop(x[:, :height, :width].flatten(1, 2))

    def _mask(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """``(rows, columns, 1, w * w, w * w)``: -100 between what was apart before the shift."""
        regions = [torch.arange(count * self.window, device=like.device).unsqueeze(1) >=
                   count * self.window - torch.tensor([self.window, self.shift],
                                                      device=like.device)
                   for count in (rows, columns)]
        down, right = (region.sum(1).unflatten(0, (-1, self.window)) for region in regions)
        kind = down[:, None, :, None] * 3 + right[None, :, None, :]
        kind = kind.flatten(2)
        apart = kind.unsqueeze(2) != kind.unsqueeze(3)
        return (apart.to(like.dtype) * -100).unsqueeze(2)

    def _attend(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """As ``WindowMSA``, with windows in dimensions of their own."""
        own = self.w_msa
        heads = own.num_heads
        qkv = own.qkv(x).unflatten(4, (3, heads, -1)).permute(4, 0, 1, 2, 5, 3, 6)
        query, key, value = qkv[0] * own.scale, qkv[1], qkv[2]
        area = self.window**2
        bias = own.relative_position_bias_table[own.relative_position_index.flatten()]
        attention = query @ key.transpose(5, 4) + bias.view(area, area, heads).permute(2, 0, 1)
        if mask is not None:
            attention = attention + mask
        mixed = (attention.softmax(5) @ value).transpose(3, 4).flatten(4)
        return own.proj_drop(own.proj(mixed))


def _roll(x: Tensor, shift: int, dim: int) -> Tensor:
    """Moves a map by that many positions towards its start, and what leaves it to its end."""
    before = (slice(None),) * dim
    return torch.cat((x[(*before, slice(shift, None))], x[(*before, slice(None, shift))]), dim)


class DeformableAttention(nn.Module):
    """For ``MultiScaleDeformableAttention`` (DINO), with levels' sizes that are numbers."""

    sampling_offsets: nn.Linear
    attention_weights: nn.Linear
    value_proj: nn.Linear
    output_proj: nn.Linear

    def __init__(self, attention: Any) -> None:
        super().__init__()
        if not attention.batch_first:
            raise ValueError('MultiScaleDeformableAttention must have batch_first=True to be '
                             'exported')
        for name in ('num_heads', 'num_levels', 'num_points', 'sampling_offsets',
                     'attention_weights', 'value_proj', 'output_proj'):
            setattr(self, name, getattr(attention, name))

    def forward(self, query: Tensor, key: Tensor | None = None, value: Tensor | None = None,
                identity: Tensor | None = None, query_pos: Tensor | None = None,
                key_padding_mask: Tensor | None = None, reference_points: Any = None,
                spatial_shapes: Any = None, **_: Any) -> Tensor:
        """See mmcv; ``spatial_shapes`` is a list of heights and widths."""
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = torch.where(key_padding_mask.unsqueeze(2), torch.zeros_like(value), value)
        value = value.unflatten(2, (self.num_heads, -1))
        shape = self.num_heads, self.num_levels, self.num_points
        offsets = self.sampling_offsets(query).unflatten(2, (*shape, 2))
        weights = self.attention_weights(query).unflatten(2, (self.num_heads, -1)).softmax(3)
        weights = weights.unflatten(3, shape[1:])
        points = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 2:
            one = offsets.new_ones(())
            sizes = torch.stack([torch.stack((one * width, one * height))
                                 for height, width in spatial_shapes])
            locations = points + offsets / sizes[:, None]
        else:
            locations = points[..., :2] + offsets / self.num_points * points[..., 2:] * 0.5
        mixed = dino.sample(value, spatial_shapes, locations, weights)
        return self.output_proj(mixed) + identity


class Enlargement(nn.Module):
    """For ``Upsample`` of MMSegmentation (Semantic FPN) and torch (RTMDet): by whole numbers.

    Theirs multiply sizes by a float.
    """

    def __init__(self, upsample: Any) -> None:
        super().__init__()
        self.size, self.mode = upsample.size, upsample.mode
        self.align_corners = upsample.align_corners
        factor = upsample.scale_factor
        self.factors = tuple(factor) if isinstance(factor, (tuple, list)) else (factor, factor)
        if not self.size and any(part is None or part != int(part) for part in self.factors):
            raise ValueError('Upsample must have whole numbers as scale_factor to be exported, '
                             f'got {factor}')

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)``, enlarged."""
        size = self.size or [side * int(part) for side, part in zip(x.shape[2:], self.factors)]
        return F.interpolate(x, size, mode=self.mode, align_corners=self.align_corners)


# By name, so that mmdet and mmseg need not be there both.
TWINS: dict[str, type] = dict(
    Upsample=Enlargement,
    AdaptiveAvgPool2d=AdaptiveAvgPool, AdaptivePadding=CornerPadding, PatchMerging=MergePatches,
    ShiftWindowMSA=ShiftedWindows, MultiScaleDeformableAttention=DeformableAttention)


def replace_(module: nn.Module) -> int:
    """Puts twins in the place of modules that need one, in place; returns how many."""
    replacements: dict[nn.Module, nn.Module] = {}
    for child in module.modules():
        name = type(child).__name__
        if name in TWINS and type(child).__module__.startswith(('torch.', 'mm')):
            replacements[child] = TWINS[name](child).eval()
    swap_(module, replacements)
    return len(replacements)
