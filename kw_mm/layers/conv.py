"""KW convolutions: drop-in for ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import checks_arguments
from ..config import WarehouseConfig
from ..ops import (
    assemble_kernel,
    assemble_logits,
    collect_gradients,
    dynamic_conv,
    triton_is_wanted,
)
from ..ops.convolution_paths import in_order, is_channels_last
from ..plan import ConvSpec, LayerPlan, plan_warehouses
from .attention import Attention
from .loading import check_fit
from .static_start import start_from_static_
from .warehouse import CellUser, WarehouseManager

PADDING_MODES = ('zeros', 'reflect', 'replicate', 'circular')

NO_WEIGHT = (
    '{} has no weight: it mixes a kernel for each image anew from its cells (kernel(x) returns '
    'them). To fold norms use kw_mm.optimize_for_inference_, to set what it computes at first '
    'from_conv, from_linear or kw_mm.layers.start_from_static_; code that cannot do without a '
    'weight needs a static layer here')


def convolve(layer: Any, x: Tensor, make_kernel: Callable[[Tensor], Tensor]) -> Tensor:
    """Convolves ``x`` with the geometry of a layer, each sample with its own kernel.

    Args:
        layer: A KW convolution, or a module with the same attributes for geometry and bias.
        x: ``(N, C_in, *spatial)``.
        make_kernel: Maps ``x`` to kernels ``(N, C_out, C_in / groups, *k)``.

    Raises:
        ValueError: If ``x`` has no batch dimension or another number of channels.
    """
    if isinstance(x, torch.fx.Proxy):
        return record_call(layer, x)
    if x.dim() != layer.num_dims + 2 or x.shape[1] != layer.in_channels:
        raise ValueError(f'x must be (N, {layer.in_channels}) and {layer.num_dims} spatial '
                         f'dimension(s), got {tuple(x.shape)}')
    kernel = make_kernel(x)
    if layer.pad_input is not None:
        x = in_order(layer.pad_input(x), is_channels_last(x))
    padding = layer.padding
    if layer.padding_mode != 'zeros':
        x = in_order(F.pad(x, layer.pads, mode=layer.padding_mode), is_channels_last(x))
        padding = (0,) * layer.num_dims
    return dynamic_conv(x, kernel, layer.bias, layer.stride, padding, layer.dilation, layer.groups)


def has_hooks(module: nn.Module) -> bool:
    """Whether something is called before or after a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def record_call(layer: nn.Module, x: torch.fx.Proxy) -> torch.fx.Proxy:
    """Records a layer's call as one node of a ``torch.fx`` graph, like torch's convolutions.

    A graph module only contains what its nodes name. So a node names shared cells, too.

    Args:
        layer: A KW layer below the module that is traced.
        x: Its input.

    Raises:
        ValueError: If the layer itself is traced, because a graph cannot call itself.
    """
    tracer: Any = x.tracer  # torch.fx.Tracer, which knows modules
    path = tracer.path_of_module(layer)
    if not path:
        raise ValueError(f'torch.fx traces modules that contain KW layers, not a '
                         f'{type(layer).__name__} by itself; put it into an nn.Sequential')
    module: Any
    for module in layer.modules():
        manager = getattr(module, 'manager', None)
        if manager is None or 'warehouse_manager' in module._modules:
            continue
        try:
            owner = tracer.path_of_module(manager)
        except NameError:
            continue  # outside of the traced module
        cells = tracer.create_proxy(
            'get_attr', f'{owner}.weights.{module.plan.warehouse}', (), {})
        x = tracer.create_proxy('call_function', beside, (x, cells), {})
    return tracer.create_proxy('call_module', path, (x,), {})


def beside(x: Tensor, cells: Tensor) -> Tensor:
    """``x``. In a ``torch.fx`` graph it tells that cells are used next."""
    return x


class _KWConvNd(CellUser):
    """Base of the three KW convolutions.

    It does not derive from torch's convolutions, because weight initialisers and batch-norm fusion
    recognise those by type and would treat the layer as static.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        kernel_size: One integer or one for each spatial dimension, as the next three.
        stride: Step between outputs.
        padding: Positions added on both sides, or ``'same'`` or ``'valid'``.
        dilation: Spacing of the kernel's positions.
        groups: Convolution groups.
        bias: Whether to add a static bias, zero at first.
        padding_mode: ``'zeros'``, ``'reflect'``, ``'replicate'`` or ``'circular'``.
        device: Of the parameters, as in torch.
        dtype: Of the parameters, as in torch.
        kw_cfg: Settings of the layer's private warehouse, which is its child
            ``warehouse_manager``.
        manager: Instead of ``kw_cfg``, the owner of shared warehouses; not registered as a child.
        name: The layer's name in the manager's plan.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a value is out of range, ``groups`` does not divide the channels, or the
            layer differs from that of its name in the manager's plan.
    """

    num_dims: int
    static_type: type[nn.Module]

    transposed = False  # read by mmcv.cnn.ConvModule, as output_padding is
    is_init = False  # read by mmengine before it calls init_weights
    # The state of a static layer of another type that it has replaced; set by kw_mm.convert.
    origin: Any = None

    @checks_arguments()
    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | Sequence[int],
                 stride: int | Sequence[int] = 1, padding: int | Sequence[int] | str = 0,
                 dilation: int | Sequence[int] = 1, groups: int = 1, bias: bool = True,
                 padding_mode: str = 'zeros', device=None, dtype=None,
                 kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None, *,
                 manager: WarehouseManager | None = None, name: str = '') -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = self._tuple('kernel_size', kernel_size, 1)
        self.stride = self._tuple('stride', stride, 1)
        self.dilation = self._tuple('dilation', dilation, 1)
        self.groups = groups
        self.padding_mode = padding_mode
        self.output_padding = (0,) * self.num_dims
        self.padding = self._check_padding(padding)
        # A module that the input passes first, or None; set by kw_mm.convert.
        self.pad_input = None
        spec = ConvSpec(name, in_channels, out_channels, self.kernel_size, groups, bool(bias))
        if manager is None:
            self._use_manager(WarehouseManager(plan_warehouses([spec], kw_cfg), device, dtype),
                              is_own=True)
        elif kw_cfg is not None:
            raise ValueError('kw_cfg must be None for a layer of shared warehouses, whose manager '
                             f'has settings of its own; got {kw_cfg!r}')
        else:
            self._use_manager(manager, is_own=False)
        self.plan = self._find_plan(self.manager, spec)
        self.attention = Attention(self.plan, device, dtype)
        self.bias = nn.Parameter(
            torch.zeros(out_channels, device=device, dtype=dtype)) if bias else None

    def __getattr__(self, name: str) -> Any:
        # AttributeError, so that hasattr(layer, 'weight') stays False.
        if name == 'weight':
            raise AttributeError(NO_WEIGHT.format(type(self).__name__))
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == 'weight':
            raise AttributeError(NO_WEIGHT.format(type(self).__name__))
        super().__setattr__(name, value)

    @classmethod
    def from_conv(cls, conv: Any,
                  kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None) -> _KWConvNd:
        """A KW convolution with a private warehouse that starts as a static one.

        With a budget of at least 1 it computes the same at temperature 0, below that the best
        approximation; see ``start_from_static_``.

        Args:
            conv: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``, as the class's own name says.
            kw_cfg: Settings of the warehouse.

        Raises:
            TypeError: If ``conv`` is of another type. Subclasses are refused too, because they may
                compute something else.
        """
        kind = type(conv)
        if kind is not cls.static_type:
            raise TypeError(f'conv must be an nn.{cls.static_type.__name__}, got '
                            f'{kind.__name__}')
        layer = cls.like(conv, kw_cfg)
        start_from_static_([(layer, conv.weight, conv.bias)])
        return layer

    @classmethod
    def like(cls, conv: Any, kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None, *,
             manager: WarehouseManager | None = None, name: str = '') -> _KWConvNd:
        """A new layer of a static one's geometry, device, dtype and mode, with random weights.

        The attention is trainable if the static weight is, and so are the cells if they are
        private.

        Args:
            conv: The static convolution.
            kw_cfg: Settings of its private warehouse.
            manager: Instead of ``kw_cfg``, the owner of shared warehouses.
            name: The layer's name in the manager's plan.
        """
        weight, bias = conv.weight, conv.bias
        layer = cls(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride,
                    conv.padding, conv.dilation, conv.groups, bias is not None, conv.padding_mode,
                    weight.device, weight.dtype, kw_cfg, manager=manager, name=name)
        layer.train(conv.training)
        layer.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(bias.requires_grad)
        return layer

    @property
    def pads(self) -> tuple[int, ...]:
        """The padding for ``F.pad``, last dimension first, from the current ``padding``."""
        if not isinstance(self.padding, str):
            return tuple(side for p in reversed(self.padding) for side in (p, p))
        totals = [d * (k - 1) * (self.padding == 'same')
                  for d, k in zip(self.dilation, self.kernel_size)]
        return tuple(s for t in reversed(totals) for s in (t // 2, t - t // 2))

    def init_weights(self) -> None:
        """Draws initial values again; OpenMMLab calls it. Shared cells are left to their owner.

        A layer that started from a static one's weights keeps them.
        """
        if not self.is_init:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws initial values again, also after a static start; shared cells stay."""
        if 'warehouse_manager' in self._modules:
            self.warehouse_manager.reset_parameters()
        self.attention.reset_parameters()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def kernel(self, x: Tensor) -> Tensor:
        """The kernels for an input ``(N, C_in, *spatial)``: ``(N, C_out, C_in / groups, *k)``."""
        attention, grid = self.attention, self.plan.grid
        # One operator for both saves launches where it is one kernel, as in Triton. Counters by
        # module, wrappers, as for sharding, and hooks want the attention to be called.
        if (not triton_is_wanted() or torch.is_grad_enabled() or torch.jit.is_tracing()
                or type(attention) is not Attention or 'forward' in attention.__dict__
                or has_hooks(attention)):
            return assemble_kernel(attention(x), collect_gradients(self.cells_as()), grid,
                                   self.kernel_size)
        # Nobody asks for the mixing weights.
        return assemble_logits(attention.logits_of(x), attention.beta, attention.tau,
                               self.cells_as(), grid, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves ``(N, C_in, *spatial)``, each sample with its own kernel; N may be 0.

        Raises:
            ValueError: If ``x`` has no batch dimension or another number of channels.
        """
        return convolve(self, x, self.kernel)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        check_fit(self, state_dict, prefix)

    def extra_repr(self) -> str:
        text = (f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
                f'stride={self.stride}')
        for field, default in (('padding', (0,) * self.num_dims),
                               ('dilation', (1,) * self.num_dims), ('groups', 1),
                               ('padding_mode', 'zeros')):
            if getattr(self, field) != default:
                text += f', {field}={getattr(self, field)!r}'
        return (f'{text}, bias={self.bias is not None}, warehouse={self.plan.warehouse}, '
                f'm={self.plan.num_mixtures}, n={self.plan.num_cells}, '
                f'own_cells={self.plan.assignment.label}')

    def _tuple(self, field: str, value: int | Sequence[int], least: int) -> tuple[int, ...]:
        values = (value,) * self.num_dims if isinstance(value, int) else value
        if not isinstance(values, Sequence) or len(values) != self.num_dims or not all(
                isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
            raise ValueError(f'{field} must be an integer >= {least} or {self.num_dims} of them, '
                             f'got {value!r}')
        return tuple(values)

    def _check_padding(self, padding: int | Sequence[int] | str) -> tuple[int, ...] | str:
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(
                f'padding_mode must be one of {PADDING_MODES}, got {self.padding_mode!r}')
        if not isinstance(padding, str):
            return self._tuple('padding', padding, 0)
        if padding not in ('same', 'valid'):
            raise ValueError(f"padding must be integers, 'same' or 'valid', got {padding!r}")
        if padding == 'same' and self.stride != (1,) * self.num_dims:
            raise ValueError(f"padding='same' needs stride 1, got stride {self.stride}")
        return padding

    @staticmethod
    def _find_plan(manager: WarehouseManager, spec: ConvSpec) -> LayerPlan:
        layers = manager.plan.layers
        if spec.name not in layers:
            raise ValueError(f'name must be a layer of the plan, one of {list(layers)}, '
                             f'got {spec.name!r}')
        planned = layers[spec.name].spec
        if (planned.weight_shape, planned.groups, planned.bias) != (
                spec.weight_shape, spec.groups, spec.bias):
            raise ValueError(f'layer {spec.name!r} must be built as planned, {planned}, got {spec}')
        return layers[spec.name]


class KWConv1d(_KWConvNd):
    """Dynamic convolution over ``(N, C, L)``, with the signature of ``nn.Conv1d``."""

    num_dims = 1
    static_type = nn.Conv1d


class KWConv2d(_KWConvNd):
    """Dynamic convolution over ``(N, C, H, W)``, with the signature of ``nn.Conv2d``."""

    num_dims = 2
    static_type = nn.Conv2d


class KWConv3d(_KWConvNd):
    """Dynamic convolution over ``(N, C, D, H, W)``, with the signature of ``nn.Conv3d``."""

    num_dims = 3
    static_type = nn.Conv3d


KWConv = KWConv1d | KWConv2d | KWConv3d
KW_CONVS = (KWConv1d, KWConv2d, KWConv3d)
