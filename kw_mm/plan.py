"""Integers only: cut kernels into cells, share warehouses, count parameters.

Everything a KernelWarehouse network needs to know before it has a single tensor is decided
here, from the geometry of its convolutions. ``print(plan)`` shows the result.
"""
from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .arguments import checks_arguments
from .assignment import Assignment, assign_cells, floor
from .config import WarehouseConfig
from .plan_table import describe_plan, describe_static

MIN_WIDTH = 16  # of the attention's hidden vector and of a non-local basis


@dataclass(frozen=True)
class ConvSpec:
    """Geometry of a convolution that will be dynamic.

    Args:
        name: Unique name, by habit its path in the network (``'layer1.0.conv1'``).
        in_channels: Input channels, all groups together.
        out_channels: Output channels.
        kernel_size: One entry for each spatial dimension, 1 to 3 of them.
        groups: Convolution groups; must divide both channel counts.
        bias: Whether it has a (static) bias.
        warehouse: Layers with equal keys share one warehouse.

    Raises:
        ValueError: If a count is not a positive integer or ``groups`` does not divide channels.
    """

    name: str
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    groups: int = 1
    bias: bool = False
    warehouse: Hashable = 0

    def __post_init__(self) -> None:
        for field in ('in_channels', 'out_channels', 'groups'):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f'{field} of {self._label} must be a positive integer, got {value!r}')
        if not isinstance(self.kernel_size, (tuple, list)) or not (
                1 <= len(self.kernel_size) <= 3) or not all(
                    isinstance(k, int) and k >= 1 for k in self.kernel_size):
            raise ValueError(f'kernel_size of {self._label} must hold 1 to 3 positive integers, '
                             f'got {self.kernel_size}')
        for field in ('in_channels', 'out_channels'):
            if getattr(self, field) % self.groups:
                raise ValueError(f'groups of {self._label} must divide {field}='
                                 f'{getattr(self, field)}, got {self.groups}')

    @property
    def _label(self) -> str:
        return f'layer {self.name!r}' if self.name else 'the layer'

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the static weight, ``(out, in / groups, *kernel_size)``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def num_static_parameters(self) -> int:
        """Parameters of the static convolution, its bias included."""
        return math.prod(self.weight_shape) + self.bias * self.out_channels


@dataclass(frozen=True)
class LayerPlan:
    """How one layer uses a warehouse: the sizes of all its tensors.

    Attributes:
        spec: The layer's geometry.
        warehouse: Index of its warehouse.
        num_cells: Cells n of that warehouse.
        cell_shape: ``(c_out, c_in, *k)`` of a cell.
        grid: ``(S, OG, IG)``, how many cells tile the kernel along positions, output and input
            channels; their product is the number of mixtures m (method, sections 2 and 4).
        hidden: Width of the attention's hidden vector.
        num_basis: Width of the non-local basis, 0 where the layer attends to every cell directly.
        attn_norm: ``'BN1d'`` or ``'LN'``.
        assignment: Which cells are the layer's own and which mixture each belongs to.
    """

    spec: ConvSpec
    warehouse: int
    num_cells: int
    cell_shape: tuple[int, ...]
    grid: tuple[int, int, int]
    hidden: int
    num_basis: int
    attn_norm: str
    assignment: Assignment

    @property
    def num_mixtures(self) -> int:
        """Mixtures m: cell-sized pieces of the layer's kernel."""
        return math.prod(self.grid)

    @property
    def num_attention_parameters(self) -> int:
        """Parameters of the layer's attention; those of the cells are the warehouse's."""
        fc1 = (self.spec.in_channels + (self.attn_norm == 'LN')) * self.hidden
        norm = 2 * self.hidden
        columns = self.num_cells + 1
        if not self.num_basis:
            return fc1 + norm + (self.hidden + 1) * self.num_mixtures * columns
        num_local = self.assignment.num_cells
        fc2 = self.hidden * self.num_mixtures * (num_local + self.num_basis + 1)
        fc3 = self.num_basis * (self.num_cells - num_local)
        return fc1 + norm + fc2 + fc3 + self.num_mixtures * columns


@dataclass(frozen=True)
class Warehouse:
    """One warehouse: its cells and, in module order, the layers that share them."""

    key: Hashable
    num_cells: int
    cell_shape: tuple[int, ...]
    config: WarehouseConfig
    layers: tuple[LayerPlan, ...]

    @property
    def num_mixtures(self) -> int:
        """Mixtures of all layers together. The actual budget is ``num_cells`` divided by this."""
        return sum(layer.num_mixtures for layer in self.layers)

    @property
    def num_parameters(self) -> int:
        """Parameters of the cells."""
        return self.num_cells * math.prod(self.cell_shape)


@dataclass(frozen=True)
class WarehousePlan:
    """Who shares what: the warehouses of a network, in order of first use.

    Attributes:
        warehouses: All of them.
        static: Names of layers that stayed static in a conversion, each with the reason.
    """

    warehouses: tuple[Warehouse, ...]
    static: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        layers = {layer.spec.name: layer for w in self.warehouses for layer in w.layers}
        object.__setattr__(self, '_layers', layers)

    @property
    def layers(self) -> Mapping[str, LayerPlan]:
        """Every layer by its name."""
        return self.__dict__['_layers']

    @property
    def num_cell_parameters(self) -> int:
        """Parameters of all cells."""
        return sum(w.num_parameters for w in self.warehouses)

    @property
    def num_attention_parameters(self) -> int:
        """Parameters of all attentions."""
        return sum(layer.num_attention_parameters for layer in self.layers.values())

    @property
    def num_parameters(self) -> int:
        """Parameters of the planned layers: cells, attentions and static biases."""
        biases = sum(p.spec.bias * p.spec.out_channels for p in self.layers.values())
        return self.num_cell_parameters + self.num_attention_parameters + biases

    @property
    def num_static_parameters(self) -> int:
        """Parameters of the same layers as static convolutions."""
        return sum(layer.spec.num_static_parameters for layer in self.layers.values())

    def __str__(self) -> str:
        return describe_plan(self)

    def describe_static(self) -> Iterator[str]:
        """One line for each reason why layers stayed static."""
        return describe_static(self.static)


@checks_arguments()
def plan_warehouses(layers: Iterable[ConvSpec],
                    kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None,
                    own_cfgs: Mapping[Hashable, WarehouseConfig | Mapping[str, Any]] | None = None
                    ) -> WarehousePlan:
    """Decides which layers share which cells.

    Sizes follow the method, section 2: the channels of a cell are the greatest common divisors of
    its layers' channels, times the plane ratios; a warehouse has ``n = max(int(b * sum_l m_l), 1)``
    cells. The assignment (section 3) follows the order of ``layers``.

    Args:
        layers: The dynamic convolutions in module order. Warehouses are numbered by first
            appearance of their key.
        kw_cfg: The settings, an object or a dict of its fields.
        own_cfgs: Settings of single warehouses by their keys. Where a dict leaves something out,
            ``kw_cfg`` applies.

    Returns:
        The plan, from which layers and warehouses are built.

    Raises:
        ValueError: If two layers have the same name, a tuple of ratios does not have one entry per
            warehouse, or cells cannot tile a layer.
        TypeError: If ``kw_cfg`` is of a wrong type.
    """
    config = WarehouseConfig.from_cfg(kw_cfg)
    shared: dict[Hashable, list[ConvSpec]] = {}
    names = set()
    for spec in layers:
        if not isinstance(spec, ConvSpec):
            raise TypeError(f'layers must hold ConvSpecs, got {spec!r}')
        if spec.name in names:
            raise ValueError(f'layers must have unique names, got {spec.name!r} twice')
        names.add(spec.name)
        shared.setdefault(spec.warehouse, []).append(spec)
    warehouses = []
    for index, (key, specs) in enumerate(shared.items()):
        settings = config.for_warehouse(index, len(shared))
        if own_cfgs and key in own_cfgs:
            own = WarehouseConfig.from_cfg(own_cfgs[key], **settings.to_dict())
            settings = own.for_warehouse(0, 1)
        warehouses.append(_plan_warehouse(index, key, specs, settings))
    return WarehousePlan(tuple(warehouses))


def count_mixtures(specs: Sequence[ConvSpec], config: WarehouseConfig) -> list[int]:
    """The number of mixtures of each layer if all layers shared one warehouse.

    Raises:
        ValueError: If they cannot.
    """
    cell_shape = _cell_shape(0, specs, config)
    return [math.prod(_grid(0, spec, cell_shape, config)) for spec in specs]


# From here on, functions take the settings of one warehouse, which are single values.


def _plan_warehouse(index: int, key: Hashable, specs: list[ConvSpec], config: Any) -> Warehouse:
    cell_shape = _cell_shape(index, specs, config)
    grids = [_grid(index, spec, cell_shape, config) for spec in specs]
    mixtures = [math.prod(grid) for grid in grids]
    num_cells = max(floor(config.cell_num_ratio * sum(mixtures)), 1)
    layers = []
    for spec, grid, assignment in zip(
            specs, grids, assign_cells(mixtures, num_cells, config.cell_num_ratio)):
        num_nonlocal = num_cells - assignment.num_cells
        # A layer that owns every cell needs no basis, which is for the cells of other layers.
        use_basis = config.nonlocal_basis_ratio < 1 and num_nonlocal > 0
        layers.append(LayerPlan(
            spec=spec,
            warehouse=index,
            num_cells=num_cells,
            cell_shape=cell_shape,
            grid=grid,
            hidden=max(int(spec.in_channels * config.reduction), MIN_WIDTH),
            num_basis=max(int(num_nonlocal * config.nonlocal_basis_ratio), MIN_WIDTH)
            if use_basis else 0,
            attn_norm=config.attn_norm,
            assignment=assignment))
    return Warehouse(key, num_cells, cell_shape, config, tuple(layers))


def _cell_shape(index: int, specs: Sequence[ConvSpec], config: Any) -> tuple[int, ...]:
    kernels = {spec.kernel_size for spec in specs}
    if len({len(kernel) for kernel in kernels}) > 1:
        raise ValueError(f'layers that share warehouse {index} must have as many spatial '
                         f'dimensions each, got kernel sizes {sorted(kernels)}')
    if config.spatial_partition:
        kernel = (1,) * len(specs[0].kernel_size)
    elif len(kernels) == 1:
        kernel = specs[0].kernel_size
    else:
        raise ValueError('spatial_partition=False needs one kernel size for all layers that '
                         f'share warehouse {index}, got {sorted(kernels)}')
    c_out = math.gcd(*(spec.weight_shape[0] for spec in specs))
    c_in = math.gcd(*(spec.weight_shape[1] for spec in specs))
    return (max(int(c_out * config.cell_outplane_ratio), 1),
            max(int(c_in * config.cell_inplane_ratio), 1), *kernel)


def _grid(index: int, spec: ConvSpec, cell_shape: tuple[int, ...],
          config: Any) -> tuple[int, int, int]:
    for field, channels, cell in (
            ('cell_outplane_ratio', spec.weight_shape[0], cell_shape[0]),
            ('cell_inplane_ratio', spec.weight_shape[1], cell_shape[1])):
        if channels % cell:
            raise ValueError(
                f'{field} must give cells that tile every layer: {getattr(config, field)} gives '
                f'{cell} channels in warehouse {index}, which does not divide the {channels} '
                f'of layer {spec.name!r}')
    positions = math.prod(spec.kernel_size) // math.prod(cell_shape[2:])
    return (positions, spec.weight_shape[0] // cell_shape[0], spec.weight_shape[1] // cell_shape[1])
