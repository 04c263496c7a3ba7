"""KW-MobileNetV2: per stage a warehouse for depthwise and one or two for pointwise layers."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmcv.cnn import build_activation_layer, build_norm_layer
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...arguments import check_positive, checks_arguments
from ...config import WarehouseConfig
from ...plan import ConvSpec
from .base import KWBackbone, check_choice, check_drop_path_rate, check_indices

# Expansion, channels, blocks, stride and KW stage of each row of blocks (method, section 6).
ROWS = ((1, 16, 1, 1, 1), (6, 24, 2, 2, 2), (6, 32, 3, 2, 3), (6, 64, 4, 2, 4), (6, 96, 3, 1, 5),
        (6, 160, 3, 2, 6), (6, 320, 1, 1, 6))
STAGES = range(1, 7)

# The feature layer behind which each output is taken, and that of the last block.
OUTPUT_LAYERS = (1, 3, 6, 13, 18)
LAST_BLOCK = 17

DEPTHWISE, EXPAND, PROJECT = 'dwconv', 'pwconv0', 'pwconv1'


class FeatureConv(NamedTuple):
    """A convolution: its path, its role and its geometry."""

    path: str
    kind: str
    in_channels: int
    out_channels: int
    stride: int = 1
    dilation: int = 1


class FeatureBlock(NamedTuple):
    """An inverted residual block: the KW stage whose warehouses it uses, and its convolutions."""

    stage: int
    convs: list[FeatureConv]

    @property
    def has_shortcut(self) -> bool:
        first, last = self.convs[0], self.convs[-1]
        return all(conv.stride == 1 for conv in self.convs) and (
            first.in_channels == last.out_channels)


class InvertedResidual(nn.Module):
    """Expansion, depthwise 3x3 and projection, with a shortcut where shapes allow it.

    Args:
        block: Geometry.
        make_conv: Builds a convolution of a geometry.
        norm_cfg: Config of the norms.
        act_cfg: Config of the activations.
        drop_path_rate: Probability to drop the branch of a sample in training, where there is a
            shortcut.
        with_cp: Whether to recompute activations in the backward pass.
    """

    def __init__(self, block: FeatureBlock, make_conv: Callable[[FeatureConv], nn.Module],
                 norm_cfg: Mapping[str, Any], act_cfg: Mapping[str, Any], drop_path_rate: float,
                 with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        *activated, linear = block.convs
        self.conv = nn.Sequential(
            *(conv_norm_act(conv, make_conv, norm_cfg, act_cfg) for conv in activated),
            make_conv(linear), build_norm_layer(norm_cfg, linear.out_channels)[1])
        self.drop_path = DropPath(drop_path_rate) if block.has_shortcut else None

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        if self.with_cp and torch.is_grad_enabled():
            y = checkpoint(self.conv, x, use_reentrant=False)
        else:
            y = self.conv(x)
        return y if self.drop_path is None else x + self.drop_path(y)


def conv_norm_act(conv: FeatureConv, make_conv: Callable[[FeatureConv], nn.Module],
                  norm_cfg: Mapping[str, Any], act_cfg: Mapping[str, Any]) -> nn.Sequential:
    """A convolution, its norm and its activation, with torchvision's keys ``0`` and ``1``."""
    return nn.Sequential(make_conv(conv), build_norm_layer(norm_cfg, conv.out_channels)[1],
                         build_activation_layer(act_cfg))


class KWMobileNetV2(KWBackbone):
    """MobileNetV2 whose stages draw their kernels from warehouses (method, section 6).

    The stem has a warehouse of its own; each of the KW stages 1 to 6 has one for its depthwise and
    one, or two, for its pointwise layers. The first block of a stage belongs to the stage before.
    State-dict keys are torchvision's, cells under ``warehouse_manager.weights.<i>`` in the order
    of first use.

    Outputs 0 to 4 are those of the feature layers 1, 3, 6, 13 and 18, at 1/2 to 1/32 of the input's
    size; ``mmdet.MobileNetV2`` numbers them 0, 1, 2, 4, 7. ``mmseg.MobileNetV2`` has no last layer,
    numbers them 0, 1, 2, 4, 6, and is the static twin with ``last_layer=False``. ``strides`` and
    ``dilations`` are as in ``mmseg.MobileNetV2``: for an output stride of 8
    ``(1, 2, 2, 1, 1, 1, 1)`` and ``(1, 1, 1, 2, 2, 4, 4)``, for 16 ``(1, 2, 2, 2, 1, 1, 1)`` and
    ``(1, 1, 1, 1, 1, 2, 2)``. Neither changes warehouses or keys.

    Args:
        widen_factor: Width, > 0. Channels are rounded to multiples of 8.
        in_channels: Channels of the input image.
        share_pointwise: Whether expanding and projecting layers of a stage share one warehouse.
        static_pointwise_stages: Those of the KW stages 1 to 6 whose pointwise layers stay static.
        strides: Stride of the first block of each of the 7 rows of blocks; None for the original
            ``(1, 2, 2, 2, 1, 2, 1)``.
        dilations: Dilation of the first block of each row; the other blocks have none.
        last_layer: Whether output 4 is that of the last 1x1 layer (1280 channels). If not, it is
            that of the last block (320), as usual in segmentation, and the layer does not run.
        out_indices: Outputs that are returned, rising.
        frozen_stages: The layers up to this output are frozen, -1 for none.
        freeze_cells: Whether to freeze also the cells that frozen layers draw on, though
            trainable layers share them (see ``KWBackbone``).
        norm_cfg: Config of the norms outside the attention.
        act_cfg: Config of the activations outside the attention.
        norm_eval: Whether batch norms, those in attentions included, use their running statistics
            in training.
        with_cp: Whether to recompute a block's activations in the backward pass to save memory.
        drop_path_rate: Stochastic depth, one rate for all blocks with a shortcut, in [0, 1).
        kw_cfg: Settings of the warehouses, a dict of ``WarehouseConfig``'s fields or the object.
        static: Whether to build the static twin, with torchvision's keys throughout.
        init_cfg: How mmengine initialises weights; None for the initial values of the method.

    Raises:
        TypeError: If ``kw_cfg`` or one of its values is of a wrong type.
        ValueError: If a value is out of range or ``kw_cfg`` holds an unknown key.
    """

    @checks_arguments()
    def __init__(self, widen_factor: float = 1.0, in_channels: int = 3,
                 share_pointwise: bool = True, static_pointwise_stages: Sequence[int] = (),
                 strides: Sequence[int] | None = None,
                 dilations: Sequence[int] = (1, 1, 1, 1, 1, 1, 1), last_layer: bool = True,
                 out_indices: Sequence[int] = (1, 2, 3, 4), frozen_stages: int = -1,
                 freeze_cells: bool = False, norm_cfg: Mapping[str, Any] | None = None,
                 act_cfg: Mapping[str, Any] | None = None, norm_eval: bool = False,
                 with_cp: bool = False, drop_path_rate: float = 0.0,
                 kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None, static: bool = False,
                 init_cfg: Mapping[str, Any] | list | None = None) -> None:
        check_positive(in_channels=in_channels)
        if not widen_factor > 0:
            raise ValueError(f'widen_factor must be > 0, got {widen_factor!r}')
        for stage in static_pointwise_stages:
            check_choice('static_pointwise_stages', stage, STAGES)
        out_indices = check_indices('out_indices', out_indices, len(OUTPUT_LAYERS))
        check_choice('frozen_stages', frozen_stages, range(-1, len(OUTPUT_LAYERS)))
        check_drop_path_rate(drop_path_rate)
        strides = tuple(row[3] for row in ROWS) if strides is None else strides
        for name, values in (('strides', strides), ('dilations', dilations)):
            if len(values) != len(ROWS) or any(value < 1 for value in values):
                raise ValueError(f'{name} must hold a positive integer for each of the {len(ROWS)} '
                                 f'rows of blocks, got {values!r}')
        stem, blocks, last = _layout(widen_factor, in_channels, strides, dilations)
        specs = _dynamic_convs(stem, blocks, last, share_pointwise, static_pointwise_stages)
        super().__init__(specs, kw_cfg, static, frozen_stages, freeze_cells, norm_eval, init_cfg)
        self.out_indices = out_indices
        self.output_layers = OUTPUT_LAYERS if last_layer else (*OUTPUT_LAYERS[:-1], LAST_BLOCK)
        norm_cfg = dict(norm_cfg or dict(type='BN'))
        act_cfg = dict(act_cfg or dict(type='ReLU6'))

        layers: list[nn.Module] = [conv_norm_act(stem, self._block_conv, norm_cfg, act_cfg)]
        layers += [InvertedResidual(block, self._block_conv, norm_cfg, act_cfg, drop_path_rate,
                                    with_cp) for block in blocks]
        layers.append(conv_norm_act(last, self._block_conv, norm_cfg, act_cfg))
        # Not an nn.Sequential, which wrappers would expect to be called.
        self.features = nn.ModuleList(layers)
        self._freeze()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the outputs in ``out_indices``.

        Args:
            x: Images, ``(N, in_channels, H, W)``.

        Returns:
            One ``(N, C_i, H_i, W_i)`` for each; with standard strides H_i = H / (2, 4, 8, 16, 32).
        """
        wanted = [self.output_layers[i] for i in self.out_indices]
        outputs = []
        for i, layer in enumerate(self.features[:wanted[-1] + 1]):
            x = layer(x)
            if i in wanted:
                outputs.append(x)
        return tuple(outputs)

    def static_layouts(self) -> dict[str, dict[str, str]]:
        """The names of MMDetection and mmpretrain."""
        last = len(self.features) - 1
        table = {f'features.{i}.{j}': f'{name}.{part}'
                 for i, name in ((0, 'conv1'), (last, 'conv2'))
                 for j, part in enumerate(('conv', 'bn'))}
        rows = [(row, block) for row, (_, _, num_blocks, _, _) in enumerate(ROWS, 1)
                for block in range(num_blocks)]
        for i, (row, block) in enumerate(rows, 1):
            ours, theirs = f'features.{i}.conv', f'layer{row}.{block}'
            layer_block: Any = self.features[i]
            activated = ('expand_conv', 'depthwise_conv')[-(len(layer_block.conv) - 2):]
            for j, layer in enumerate(activated):
                table.update({f'{ours}.{j}.0': f'{theirs}.{layer}.conv',
                              f'{ours}.{j}.1': f'{theirs}.{layer}.bn'})
            table.update({f'{ours}.{len(activated)}': f'{theirs}.linear_conv.conv',
                          f'{ours}.{len(activated) + 1}': f'{theirs}.linear_conv.bn'})
        return dict(mmdet=table)

    def _block_conv(self, conv: FeatureConv) -> nn.Module:
        kernel_size, groups = _kernel_and_groups(conv)
        return self._conv(conv.path, conv.in_channels, conv.out_channels, kernel_size,
                          stride=conv.stride, padding=kernel_size // 2 * conv.dilation,
                          dilation=conv.dilation, groups=groups, bias=False)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return list(self.features[:self.output_layers[self.frozen_stages] + 1])

    def _idle_modules(self) -> list[nn.Module]:
        return list(self.features[self.output_layers[self.out_indices[-1]] + 1:])


def make_divisible(value: float, divisor: int = 8) -> int:
    """Rounds to a multiple of the divisor, but never below 0.9 of the value."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded if rounded >= 0.9 * value else rounded + divisor


def _layout(widen_factor: float, in_channels: int, strides: Sequence[int],
            dilations: Sequence[int]) -> tuple[FeatureConv, list[FeatureBlock], FeatureConv]:
    """The stem, the blocks and the last layer."""
    channels = make_divisible(32 * widen_factor)
    stem = FeatureConv('features.0.0', 'stem', in_channels, channels, 2)
    blocks: list[FeatureBlock] = []
    previous = STAGES[0]
    for (expansion, width, num_blocks, _, stage), *first in zip(ROWS, strides, dilations):
        for i in range(num_blocks):
            stride, dilation = first if i == 0 else (1, 1)
            hidden, out_channels = channels * expansion, make_divisible(width * widen_factor)
            path = f'features.{len(blocks) + 1}.conv'
            depthwise = FeatureConv(f'{path}.0.0', DEPTHWISE, hidden, hidden, stride, dilation)
            project = FeatureConv(f'{path}.1', PROJECT, hidden, out_channels)
            if expansion == 1:
                convs = [depthwise, project]
            else:
                convs = [FeatureConv(f'{path}.0.0', EXPAND, channels, hidden),
                         depthwise._replace(path=f'{path}.1.0'),
                         project._replace(path=f'{path}.2')]
            # The first block of a stage uses the warehouses of the stage before it.
            blocks.append(FeatureBlock(previous, convs))
            channels, previous = out_channels, stage
    last = FeatureConv(f'features.{len(blocks) + 1}.0', PROJECT, channels,
                    make_divisible(1280 * max(1.0, widen_factor)))
    return stem, blocks, last


def _dynamic_convs(stem: FeatureConv, blocks: Sequence[FeatureBlock], last: FeatureConv,
                   share_pointwise: bool, static_stages: Sequence[int]) -> Iterator[ConvSpec]:
    """The dynamic convolutions in module order, each with the key of its warehouse."""
    for stage, convs in ((0, [stem]), *blocks, (STAGES[-1], [last])):
        for conv in convs:
            kind = conv.kind
            if kind in (EXPAND, PROJECT):
                if stage in static_stages:
                    continue
                kind = 'pwconv' if share_pointwise else kind
            kernel_size, groups = _kernel_and_groups(conv)
            yield ConvSpec(conv.path, conv.in_channels, conv.out_channels, (kernel_size,) * 2,
                           groups, warehouse=f'stage{stage}.{kind}')


def _kernel_and_groups(conv: FeatureConv) -> tuple[int, int]:
    pointwise = conv.kind in (EXPAND, PROJECT)
    return 1 if pointwise else 3, conv.in_channels if conv.kind == DEPTHWISE else 1
