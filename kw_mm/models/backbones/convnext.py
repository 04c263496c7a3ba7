"""KW-ConvNeXt: every convolution dynamic (method, section 6)."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...arguments import check_positive, checks_arguments
from ...config import WarehouseConfig
from ...plan import ConvSpec
from .base import KWBackbone, check_choice, check_drop_path_rate, check_indices


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of ``(N, C, H, W)``, separately at each position.

    Its output is channels-last in memory, whatever its input is.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(N, C, H, W)``."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, norm, and two pointwise layers around a GELU, with a shortcut around them.

    Args:
        specs: Geometry of ``dwconv``, ``pwconv1`` and ``pwconv2``.
        make_conv: Builds a convolution of that geometry.
        drop_path_rate: Probability to drop the branch of a sample in training.
        layer_scale_init_value: Initial factor of the branch, per channel; 0 for no such factor.
        with_cp: Whether to recompute activations in the backward pass.
    """

    def __init__(self, specs: Sequence[ConvSpec], make_conv: Callable[[ConvSpec], nn.Module],
                 drop_path_rate: float, layer_scale_init_value: float, with_cp: bool) -> None:
        super().__init__()
        channels = specs[0].out_channels
        self.with_cp = with_cp
        self.dwconv, self.pwconv1, self.pwconv2 = map(make_conv, specs)
        self.norm = ChannelNorm(channels)
        self.gamma = nn.Parameter(torch.full(
            (1, channels, 1, 1), float(layer_scale_init_value))) if layer_scale_init_value else None
        self.layer_scale_init_value = layer_scale_init_value
        self.drop_path = DropPath(drop_path_rate)

    def reset_parameters(self) -> None:
        """Sets the factor of the branch to its initial value; the layers reset themselves."""
        if self.gamma is not None:
            nn.init.constant_(self.gamma, self.layer_scale_init_value)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C, H, W)`` to the same shape."""
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._residual, x, use_reentrant=False)
        return self._residual(x)

    def _residual(self, x: Tensor) -> Tensor:
        y = self.pwconv2(F.gelu(self.pwconv1(self.norm(self.dwconv(x)))))
        if self.gamma is not None:
            y = self.gamma * y
        return x + self.drop_path(y)


class KWConvNeXt(KWBackbone):
    """ConvNeXt whose kernels all come from warehouses (method, section 6).

    The stem and each downsampling convolution have a warehouse of their own; each stage has one
    for its depthwise and one for its pointwise layers, which are 1x1 convolutions here. State-dict
    keys are those of the official ConvNeXt, cells under ``warehouse_manager.weights.<i>``: first
    the stem's, the downsampling layers', then two for each stage.

    With an ``output_stride``, the downsampling layers that would exceed it have stride 1, and they
    and the 7x7 kernels behind them are dilated instead, so that each kernel covers the same image
    region as before. At every second (fourth, ...) position the static twin then computes the same
    as without ``output_stride``. Warehouses and keys do not change.

    Args:
        arch: ``'tiny'``, ``'small'``, ``'base'``, ``'large'``, or a dict of ``depths`` and
            ``channels`` with an entry for each stage.
        in_channels: Channels of the input image.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); rises to it linearly.
        layer_scale_init_value: Initial value of the blocks' ``gamma``, >= 0 (the paper: 1e-6 in
            pretraining, 1 in detection); 0 for blocks without.
        out_indices: Stages whose outputs are returned, rising; each has a norm ``norm<i>``.
        output_stride: Largest ratio of the image's size to that of an output, 4, 8, 16 or 32; None
            for no limit, which means 32 for the named architectures.
        frozen_stages: Stem and stages up to this number are frozen: -1 none, 0 the stem, 1 the stem
            and ``stages.0``, 2 also ``stages.1`` with its downsampling, and so on.
        freeze_cells: Whether to freeze also the cells that frozen layers draw on.
        with_cp: Whether to recompute a block's activations in the backward pass to save memory.
        kw_cfg: Settings of the warehouses, a dict of ``WarehouseConfig``'s fields or the object.
            ``attn_norm`` is ``'LN'`` where it does not say.
        static: Whether to build the static twin: the official ConvNeXt with its pointwise linear
            layers as 1x1 convolutions.
        init_cfg: How mmengine initialises weights; None for the initial values of the method.

    Raises:
        TypeError: If ``kw_cfg`` or one of its values is of a wrong type.
        ValueError: If a value is out of range or ``kw_cfg`` holds an unknown key.
    """

    arch_settings = {
        'tiny': dict(depths=(3, 3, 9, 3), channels=(96, 192, 384, 768)),
        'small': dict(depths=(3, 3, 27, 3), channels=(96, 192, 384, 768)),
        'base': dict(depths=(3, 3, 27, 3), channels=(128, 256, 512, 1024)),
        'large': dict(depths=(3, 3, 27, 3), channels=(192, 384, 768, 1536)),
    }
    kw_defaults = dict(attn_norm='LN')
    # Classifiers have a norm before the last layer, and lack the norms of the outputs.
    static_extras = (*KWBackbone.static_extras, 'norm.')
    static_optional = ('norm0.', 'norm1.', 'norm2.', 'norm3.')

    @checks_arguments('output_stride')
    def __init__(self, arch: str | Mapping[str, Sequence[int]] = 'tiny', in_channels: int = 3,
                 drop_path_rate: float = 0.0, layer_scale_init_value: float = 1e-6,
                 out_indices: Sequence[int] = (0, 1, 2, 3), output_stride: int | None = None,
                 frozen_stages: int = -1, freeze_cells: bool = False, with_cp: bool = False,
                 kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None, static: bool = False,
                 init_cfg: Mapping[str, Any] | list | None = None) -> None:
        check_positive(in_channels=in_channels)
        depths, channels = self._check_arch(arch)
        out_indices = check_indices('out_indices', out_indices, len(depths))
        check_choice('frozen_stages', frozen_stages, range(-1, len(depths) + 1))
        check_drop_path_rate(drop_path_rate)
        if output_stride is not None:
            check_choice('output_stride', output_stride, (4, 8, 16, 32))
        if layer_scale_init_value < 0:
            raise ValueError(
                f'layer_scale_init_value must be >= 0, got {layer_scale_init_value!r}')
        downsampling = _downsampling_specs((in_channels, *channels))
        stages = [_stage_specs(stage, *size) for stage, size in enumerate(zip(depths, channels))]
        specs = [*downsampling, *(conv for stage in stages for block in stage for conv in block)]
        super().__init__(specs, kw_cfg, static, frozen_stages, freeze_cells, False, init_cfg)
        self.out_indices = out_indices

        # The factor by which each stage's stride would exceed the limit.
        self.dilations = [max(4 * 2**stage // (output_stride or 4 * 2**stage), 1)
                          for stage in range(len(depths))]
        self.downsample_layers = nn.ModuleList()
        for i, conv in enumerate(downsampling):
            layers = [self._downsampling_conv(i, conv),
                      ChannelNorm(conv.out_channels if i == 0 else conv.in_channels)]
            self.downsample_layers.append(nn.Sequential(*(layers if i == 0 else layers[::-1])))
        last = max(sum(depths) - 1, 1)
        rates = iter([drop_path_rate * i / last for i in range(sum(depths))])
        self.stages = nn.ModuleList(
            nn.Sequential(*(
                ConvNeXtBlock(block, partial(self._block_conv, dilation), next(rates),
                              layer_scale_init_value, with_cp)
                for block in stage)) for stage, dilation in zip(stages, self.dilations))
        for i in out_indices:
            self.add_module(f'norm{i}', ChannelNorm(channels[i]))
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the stages in ``out_indices``.

        Args:
            x: Images, ``(N, in_channels, H, W)``.

        Returns:
            One ``(N, C_i, H_i, W_i)`` for each, normalised, contiguous if the images are; H_i is H
            divided by 4, 8, 16 and 32, but by at most ``output_stride``.
        """
        images, outputs = x, []
        for i in range(self.out_indices[-1] + 1):
            x = self.downsample_layers[i](x)
            if self._is_dense(i):
                # Padding is on both sides, but the 2x2 kernel begins at its own position.
                first = self.dilations[i - 1]
                x = x[:, :, first:, first:]
            x = self.stages[i](x)
            if i in self.out_indices:
                outputs.append(_in_order_of(images, getattr(self, f'norm{i}')(x)))
        return tuple(outputs)

    def static_layouts(self) -> dict[str, dict[str, str]]:
        """Torchvision's and mmpretrain's names of the official layers."""
        torchvision, mmpretrain = {}, {}
        parts: Any = self.downsample_layers
        for i, downsampling in enumerate(parts):
            torchvision.update({f'downsample_layers.{i}.{j}': f'features.{2 * i}.{j}'
                                for j in range(len(downsampling))})
        stages: Any = self.stages
        for i, stage in enumerate(stages):
            for j in range(len(stage)):
                ours, theirs = f'stages.{i}.{j}', f'features.{2 * i + 1}.{j}'
                torchvision.update({
                    f'{ours}.dwconv': f'{theirs}.block.0', f'{ours}.norm': f'{theirs}.block.2',
                    f'{ours}.pwconv1': f'{theirs}.block.3', f'{ours}.pwconv2': f'{theirs}.block.5',
                    f'{ours}.gamma': f'{theirs}.layer_scale'})
                mmpretrain.update({
                    f'{ours}.dwconv': f'{ours}.depthwise_conv',
                    f'{ours}.pwconv1': f'{ours}.pointwise_conv1',
                    f'{ours}.pwconv2': f'{ours}.pointwise_conv2'})
        return dict(torchvision=torchvision, mmpretrain=mmpretrain)

    @classmethod
    def _check_arch(cls, arch: str | Mapping[str, Sequence[int]]) -> tuple[Sequence[int], ...]:
        if isinstance(arch, str):
            check_choice('arch', arch, cls.arch_settings)
            arch = cls.arch_settings[arch]
        sizes = dict(arch) if isinstance(arch, Mapping) else {}
        if set(sizes) != {'depths', 'channels'} or len(sizes['depths']) != len(
                sizes['channels']) or not all(
                    isinstance(size, int) and size > 0 for values in sizes.values()
                    for size in values):
            raise ValueError(f'arch must be one of {list(cls.arch_settings)} or a dict of depths '
                             f'and channels, a positive integer for each stage, got {arch!r}')
        return sizes['depths'], sizes['channels']

    def _is_dense(self, stage: int) -> bool:
        """Whether the downsampling layer before a stage has stride 1."""
        return stage > 0 and self.dilations[stage] > self.dilations[stage - 1]

    def _planned_conv(self, spec: ConvSpec, **kwargs: Any) -> nn.Module:
        return self._conv(spec.name, spec.in_channels, spec.out_channels, spec.kernel_size,
                          groups=spec.groups, **kwargs)

    def _downsampling_conv(self, stage: int, spec: ConvSpec) -> nn.Module:
        if self._is_dense(stage):
            dilation = self.dilations[stage - 1]
            return self._planned_conv(spec, padding=dilation, dilation=dilation)
        return self._planned_conv(spec, stride=spec.kernel_size[0])

    def _block_conv(self, dilation: int, spec: ConvSpec) -> nn.Module:
        if spec.kernel_size == (1, 1):
            return self._planned_conv(spec)
        return self._planned_conv(spec, padding=spec.kernel_size[0] // 2 * dilation,
                                  dilation=dilation)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [*self.downsample_layers[:max(self.frozen_stages, 1)],
                *self.stages[:self.frozen_stages]]

    def _idle_modules(self) -> list[nn.Module]:
        first = self.out_indices[-1] + 1
        return [*self.downsample_layers[first:], *self.stages[first:]]


@torch.fx.wrap  # torch.fx cannot trace conditions on strides
def _in_order_of(images: Tensor, y: Tensor) -> Tensor:
    """Makes maps, which the norms left channels-last, contiguous if the images are."""
    return y.contiguous() if images.is_contiguous() else y


def _downsampling_specs(channels: Sequence[int]) -> list[ConvSpec]:
    """The stem and the convolutions between stages, each with a warehouse of its own."""
    return [ConvSpec(f'downsample_layers.{i}.{int(i > 0)}', *sizes, (2, 2) if i else (4, 4),
                     bias=True, warehouse=f'downsample{i}')
            for i, sizes in enumerate(zip(channels, channels[1:]))]


def _stage_specs(stage: int, depth: int, channels: int) -> list[list[ConvSpec]]:
    """The convolutions of a stage, block by block."""
    def blocks() -> Iterator[list[ConvSpec]]:
        for block in range(depth):
            path = f'stages.{stage}.{block}'
            pointwise: dict[str, Any] = dict(kernel_size=(1, 1), bias=True,
                                             warehouse=f'stage{stage}.pwconv')
            yield [ConvSpec(f'{path}.dwconv', channels, channels, (7, 7), groups=channels,
                            bias=True, warehouse=f'stage{stage}.dwconv'),
                   ConvSpec(f'{path}.pwconv1', channels, 4 * channels, **pointwise),
                   ConvSpec(f'{path}.pwconv2', 4 * channels, channels, **pointwise)]
    return list(blocks())
