"""KW-ResNet: one warehouse per stage (method, section 6)."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...arguments import check_positive, checks_arguments
from ...config import WarehouseConfig
from ...plan import ConvSpec
from .base import KWBackbone, check_choice, check_drop_path_rate, check_indices


class BlockConv(NamedTuple):
    """A convolution of a residual block: its name and its geometry."""

    name: str
    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int = 1
    dilation: int = 1


class ResidualBlock(nn.Module):
    """Convolutions with norms, a shortcut around them, and stochastic depth on the branch.

    Args:
        convs: Geometry of the convolutions, named ``conv1``, ``conv2``, ...
        make_conv: Builds a convolution of that geometry.
        downsample: The shortcut where shapes change, or None for the identity.
        norm_cfg: Config of the norms, named as mmcv does (``bn1``, ...).
        drop_path_rate: Probability to drop the branch of a sample in training.
        with_cp: Whether to recompute activations in the backward pass.
        zero_init_residual: Whether the last norm starts at zero, so that the block starts as its
            shortcut.
    """

    def __init__(self, convs: Sequence[BlockConv], make_conv: Callable[[BlockConv], nn.Module],
                 downsample: nn.Module | None, norm_cfg: Mapping[str, Any], drop_path_rate: float,
                 with_cp: bool, zero_init_residual: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        self._layers = []
        for i, conv in enumerate(convs, 1):
            norm_name, norm = build_norm_layer(norm_cfg, conv.out_channels, postfix=i)
            self.add_module(conv.name, make_conv(conv))
            self.add_module(norm_name, norm)
            self._layers.append((conv.name, norm_name))
        if zero_init_residual:
            nn.init.zeros_(norm.weight)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, C_in, H, W)`` to ``(N, C_out, H / stride, W / stride)``."""
        if self.with_cp and torch.is_grad_enabled():
            return self.relu(checkpoint(self._residual, x, use_reentrant=False))
        return self.relu(self._residual(x))

    def conv_norm_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """Pairs of a convolution and the norm directly behind it."""
        return [(getattr(self, conv), getattr(self, norm)) for conv, norm in self._layers]

    def _residual(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(self._layers):
            y = getattr(self, norm)(getattr(self, conv)(self.relu(y) if i else y))
        shortcut = x if self.downsample is None else self.downsample(x)
        return shortcut + self.drop_path(y)


def basic_convs(in_channels: int, planes: int, stride: int, dilation: int) -> list[BlockConv]:
    """The two 3x3 convolutions of ResNet18 and 34."""
    return [BlockConv('conv1', in_channels, planes, 3, stride, dilation),
            BlockConv('conv2', planes, planes, 3)]


def bottleneck_convs(in_channels: int, planes: int, stride: int, dilation: int) -> list[BlockConv]:
    """The 1x1, 3x3 and 1x1 convolutions of the deeper networks; the 3x3 has stride and dilation."""
    return [BlockConv('conv1', in_channels, planes, 1),
            BlockConv('conv2', planes, planes, 3, stride, dilation),
            BlockConv('conv3', planes, 4 * planes, 1)]


class BlockGeometry(NamedTuple):
    """A residual block: its place, its convolutions and its shortcut's, if that has one."""

    stage: int
    number: int
    convs: list[BlockConv]
    shortcut: BlockConv | None

    @property
    def path(self) -> str:
        return f'layer{self.stage + 1}.{self.number}'


class KWResNet(KWBackbone):
    """ResNet whose stages draw their kernels from warehouses (method, section 6).

    One warehouse per stage holds all its convolutions, 1x1 and 3x3 alike. In the first block of
    stages 1 to 3, conv1 and the shortcut's convolution use the warehouse of the stage before. The
    stem is static. So are, in stage 0 of the deeper networks (bottlenecks), the first conv1 and the
    shortcut's convolution. State-dict keys are torchvision's, cells under
    ``warehouse_manager.weights.<stage>``.

    Options are those of ``mmdet.ResNet`` and ``mmseg.ResNet``, except that the stride is always on
    the 3x3 (``style='pytorch'``), and that ``kw_cfg``, ``static``, ``drop_path_rate`` and
    ``freeze_cells`` are added.

    Args:
        depth: 18, 34, 50, 101 or 152.
        in_channels: Channels of the input image.
        stem_channels: Output channels of the stem, ``base_channels`` by default.
        base_channels: Width of stage 0.
        num_stages: How many stages, 1 to 4.
        strides: Stride of each stage's first block.
        dilations: Dilation of each stage.
        contract_dilation: Whether a dilated stage's first block has half the dilation.
        multi_grid: Dilation of each block of the last stage, instead of one for the stage.
        out_indices: Stages whose outputs are returned, rising.
        style: ``'pytorch'``.
        deep_stem: Whether three 3x3 convolutions make the stem instead of one 7x7.
        avg_down: Whether shortcuts use average pooling and a convolution of stride 1 instead of a
            strided one.
        frozen_stages: Stem and stages up to this number are frozen: -1 none, 0 the stem, 1 the
            stem and ``layer1``, and so on.
        freeze_cells: Whether to freeze also the cells that frozen layers draw on, though
            trainable layers share them (see ``KWBackbone``).
        norm_cfg: Config of the norms outside the attention.
        norm_eval: Whether batch norms, those in attentions included, use their running statistics
            in training.
        with_cp: Whether to recompute a block's activations in the backward pass to save memory.
        zero_init_residual: Whether each block's last norm starts at zero.
        drop_path_rate: Stochastic depth, one rate for all blocks, in [0, 1).
        kw_cfg: Settings of the warehouses, a dict of ``WarehouseConfig``'s fields or the object.
        static: Whether to build the static twin, with torchvision's keys throughout.
        init_cfg: How mmengine initialises weights; None for the initial values of the method.

    Raises:
        TypeError: If ``kw_cfg`` or one of its values is of a wrong type.
        ValueError: If a value is out of range or ``kw_cfg`` holds an unknown key.
    """

    arch_settings = {
        18: (basic_convs, (2, 2, 2, 2)),
        34: (basic_convs, (3, 4, 6, 3)),
        50: (bottleneck_convs, (3, 4, 6, 3)),
        101: (bottleneck_convs, (3, 4, 23, 3)),
        152: (bottleneck_convs, (3, 8, 36, 3)),
    }

    @checks_arguments()
    def __init__(self, depth: int, in_channels: int = 3, stem_channels: int | None = None,
                 base_channels: int = 64, num_stages: int = 4,
                 strides: Sequence[int] = (1, 2, 2, 2), dilations: Sequence[int] = (1, 1, 1, 1),
                 contract_dilation: bool = False, multi_grid: Sequence[int] | None = None,
                 out_indices: Sequence[int] = (0, 1, 2, 3), style: str = 'pytorch',
                 deep_stem: bool = False, avg_down: bool = False, frozen_stages: int = -1,
                 freeze_cells: bool = False, norm_cfg: Mapping[str, Any] | None = None,
                 norm_eval: bool = True, with_cp: bool = False, zero_init_residual: bool = True,
                 drop_path_rate: float = 0.0,
                 kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None, static: bool = False,
                 init_cfg: Mapping[str, Any] | list | None = None) -> None:
        check_positive(in_channels=in_channels, base_channels=base_channels)
        if stem_channels is not None:
            check_positive(stem_channels=stem_channels)
        check_choice('depth', depth, self.arch_settings)
        check_choice('num_stages', num_stages, range(1, 5))
        check_choice('style', style, ['pytorch'])
        check_choice('frozen_stages', frozen_stages, range(-1, num_stages + 1))
        out_indices = check_indices('out_indices', out_indices, num_stages)
        for name, values in (('strides', strides), ('dilations', dilations)):
            if len(values) < num_stages or any(value < 1 for value in values):
                raise ValueError(f'{name} must hold a positive integer for each of the '
                                 f'{num_stages} stages, got {values!r}')
        check_drop_path_rate(drop_path_rate)
        stem_channels = stem_channels or base_channels
        block_convs, all_depths = self.arch_settings[depth]
        depths = all_depths[:num_stages]
        if multi_grid is not None and (len(multi_grid) != depths[-1] or min(multi_grid) < 1):
            raise ValueError(f'multi_grid must hold a positive integer for each of the '
                             f'{depths[-1]} blocks of the last stage, got {multi_grid!r}')
        blocks = list(_layout(block_convs, stem_channels, base_channels, strides, _dilations(
            depths, dilations, contract_dilation, multi_grid)))
        super().__init__(_dynamic_convs(blocks, avg_down), kw_cfg, static, frozen_stages,
                         freeze_cells, norm_eval, init_cfg)
        self.depth = depth
        self.num_stages = num_stages
        self.out_indices = out_indices
        self.deep_stem = deep_stem
        norm_cfg = dict(norm_cfg or dict(type='BN', requires_grad=True))

        self._add_stem(in_channels, stem_channels, norm_cfg)
        for stage in range(num_stages):
            self.add_module(f'layer{stage + 1}', nn.Sequential(*(
                ResidualBlock(
                    block.convs,
                    partial(self._named_conv, block.path),
                    self._shortcut(block, avg_down, norm_cfg), norm_cfg, drop_path_rate, with_cp,
                    zero_init_residual)
                for block in blocks if block.stage == stage)))
        self.feat_dim = blocks[-1].convs[-1].out_channels
        self._freeze()

    @property
    def stages(self) -> list[nn.Sequential]:
        """``layer1`` to ``layer4``, as many as there are."""
        return [getattr(self, f'layer{stage + 1}') for stage in range(self.num_stages)]

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the stages in ``out_indices``.

        Args:
            x: Images, ``(N, in_channels, H, W)``.

        Returns:
            One ``(N, C_i, H_i, W_i)`` for each; with standard strides H_i = H / (4, 8, 16, 32).
        """
        x = self.stem(x) if self.deep_stem else self.relu(getattr(self, self._norm1)(self.conv1(x)))
        x = self.maxpool(x)
        outputs = []
        for i, stage in enumerate(self.stages[:self.out_indices[-1] + 1]):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)

    def conv_norm_pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        """The stem's convolution and the norm directly behind it."""
        return [] if self.deep_stem else [(self.conv1, getattr(self, self._norm1))]

    @property
    def static_extras(self) -> tuple[str, ...]:  # type: ignore[override]
        """Classifiers, and stages beyond ``num_stages``."""
        return (*KWBackbone.static_extras,
                *(f'layer{stage}.' for stage in range(self.num_stages + 1, 5)))

    def _add_stem(self, in_channels: int, channels: int, norm_cfg: Mapping[str, Any]) -> None:
        self.relu = nn.ReLU(inplace=True)
        if self.deep_stem:
            half = channels // 2
            layers = []
            for i, (inputs, outputs, stride) in enumerate(
                    ((in_channels, half, 2), (half, half, 1), (half, channels, 1))):
                layers += [self._conv('', inputs, outputs, 3, stride=stride, padding=1, bias=False),
                           build_norm_layer(norm_cfg, outputs, postfix=i + 1)[1],
                           nn.ReLU(inplace=True)]
            self.stem = nn.Sequential(*layers)
        else:
            self.conv1 = self._conv('conv1', in_channels, channels, 7, stride=2, padding=3,
                                    bias=False)
            self._norm1, norm = build_norm_layer(norm_cfg, channels, postfix=1)
            self.add_module(self._norm1, norm)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def _named_conv(self, path: str, conv: BlockConv) -> nn.Module:
        return self._block_conv(f'{path}.{conv.name}', conv)

    def _block_conv(self, name: str, conv: BlockConv) -> nn.Module:
        return self._conv(name, conv.in_channels, conv.out_channels, conv.kernel_size,
                          stride=conv.stride, padding=conv.kernel_size // 2 * conv.dilation,
                          dilation=conv.dilation, bias=False)

    def _shortcut(self, block: BlockGeometry, avg_down: bool,
                  norm_cfg: Mapping[str, Any]) -> nn.Sequential | None:
        conv = block.shortcut
        if conv is None:
            return None
        layers: list[nn.Module] = []
        if avg_down:
            layers.append(nn.AvgPool2d(conv.stride, conv.stride, ceil_mode=True,
                                       count_include_pad=False))
            conv = conv._replace(stride=1)
        layers += [self._block_conv(_shortcut_path(block, avg_down), conv),
                   build_norm_layer(norm_cfg, conv.out_channels)[1]]
        return nn.Sequential(*layers)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        stem = [self.stem] if self.deep_stem else [self.conv1, getattr(self, self._norm1)]
        return [*stem, *self.stages[:self.frozen_stages]]

    def _idle_modules(self) -> list[nn.Module]:
        return list(self.stages[self.out_indices[-1] + 1:])


def _dilations(depths: Sequence[int], dilations: Sequence[int], contract: bool,
               multi_grid: Sequence[int] | None) -> list[list[int]]:
    """The dilation of each block, stage by stage."""
    blocks = [[dilation] * depth for depth, dilation in zip(depths, dilations)]
    if contract:
        for stage in blocks:
            stage[0] = max(stage[0] // 2, 1)
    if multi_grid is not None:
        blocks[-1] = list(multi_grid)
    return blocks


def _layout(block_convs: Callable[..., list[BlockConv]], in_channels: int, base_channels: int,
            strides: Sequence[int], dilations: Sequence[Sequence[int]]) -> Iterator[BlockGeometry]:
    for stage, block_dilations in enumerate(dilations):
        for index, dilation in enumerate(block_dilations):
            stride = strides[stage] if index == 0 else 1
            convs = block_convs(in_channels, base_channels * 2**stage, stride, dilation)
            out_channels = convs[-1].out_channels
            changes = stride != 1 or in_channels != out_channels
            yield BlockGeometry(stage, index, convs, BlockConv(
                'downsample', in_channels, out_channels, 1, stride) if changes else None)
            in_channels = out_channels


def _dynamic_convs(blocks: Sequence[BlockGeometry], avg_down: bool) -> Iterator[ConvSpec]:
    """The dynamic convolutions in module order, each with the stage whose warehouse it uses."""
    for block in blocks:
        bottleneck = len(block.convs) == 3
        for conv in (*block.convs, block.shortcut):
            if conv is None:
                continue
            # The block's place decides, not its stride, because dilation may replace that.
            handed_over = block.number == 0 and conv.name in ('conv1', 'downsample')
            if handed_over and block.stage == 0 and (bottleneck or conv.name == 'downsample'):
                continue  # no stage before it: static
            stage = max(block.stage - handed_over, 0)
            path = (_shortcut_path(block, avg_down) if conv.name == 'downsample' else
                    f'{block.path}.{conv.name}')
            yield ConvSpec(path, conv.in_channels, conv.out_channels, (conv.kernel_size,) * 2,
                           warehouse=f'stage{stage}')


def _shortcut_path(block: BlockGeometry, avg_down: bool) -> str:
    return f'{block.path}.downsample.{int(bool(avg_down))}'
