"""What a user may choose about warehouses: one frozen, validated object."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from numbers import Real
from typing import Any

PerWarehouse = float | tuple[float, ...]

ATTENTION_NORMS = ('BN1d', 'LN')


@dataclass(frozen=True)
class WarehouseConfig:
    """Settings of the warehouses of a network, under the authors' names.

    Every field but ``attn_norm`` is one value for all warehouses or a tuple with one entry per
    warehouse, in the order in which the network first uses them (method, section 2). A list is
    taken for a tuple, so that configs read from JSON or YAML work.

    Args:
        cell_num_ratio: The convolutional parameter budget b: cells per mixture that draws on
            them. Any finite number > 0; 1 keeps the parameter count of static convolutions.
        cell_inplane_ratio: Input channels of a cell over the greatest common divisor of the
            layers' input channels (per group), in (0, 1].
        cell_outplane_ratio: The same for output channels, in (0, 1].
        reduction: Hidden width of the attention over a layer's input channels (never below 16
            hidden units). Any finite number > 0.
        nonlocal_basis_ratio: In (0, 1]. Below 1, a layer attends to the cells of other layers
            through a basis of this share of their number (method, section 3).
        spatial_partition: Whether kernels are also cut into their positions. Cells are then 1x1,
            and layers of different kernel sizes can share them.
        attn_norm: Norm inside the attention, ``'BN1d'`` (ResNet, MobileNetV2) or ``'LN'``
            (ConvNeXt).

    Raises:
        TypeError: If a value is of a wrong type, e.g. a ratio given as a string.
        ValueError: If a value is out of range; zero, negative and NaN ratios are.
    """

    cell_num_ratio: PerWarehouse = 1
    cell_inplane_ratio: PerWarehouse = 1
    cell_outplane_ratio: PerWarehouse = 1
    reduction: PerWarehouse = 1 / 16
    nonlocal_basis_ratio: PerWarehouse = 1
    spatial_partition: bool | tuple[bool, ...] = True
    attn_norm: str = 'BN1d'

    def __post_init__(self) -> None:
        for name in ('cell_num_ratio', 'reduction'):
            self._set(name, partial(_positive, name))
        for name in ('cell_inplane_ratio', 'cell_outplane_ratio', 'nonlocal_basis_ratio'):
            self._set(name, partial(_positive, name, upper=1))
        self._set('spatial_partition', _flag)
        if not isinstance(self.attn_norm, str) or self.attn_norm not in ATTENTION_NORMS:
            raise ValueError(f'attn_norm must be one of {ATTENTION_NORMS}, got {self.attn_norm!r}')

    def _set(self, name: str, check: Callable[[Any], Any]) -> None:
        value = getattr(self, name)
        if isinstance(value, Sequence) and not isinstance(value, str):
            if not value:
                raise ValueError(f'{name} must have one entry per warehouse, got an empty tuple')
            value = tuple(check(entry) for entry in value)
        else:
            value = check(value)
        object.__setattr__(self, name, value)

    @classmethod
    def from_cfg(cls, kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None,
                 **defaults: Any) -> WarehouseConfig:
        """Builds the object from what a config file holds.

        Args:
            kw_cfg: A mapping of field names to values, such an object (returned as it is), or None
                for the defaults.
            **defaults: Values of fields that ``kw_cfg`` leaves out, e.g. those of a backbone.

        Raises:
            TypeError: If ``kw_cfg`` is none of these.
            ValueError: If it has a key that is no field, or a value out of range.
        """
        if isinstance(kw_cfg, cls):
            return kw_cfg
        if kw_cfg is None:
            kw_cfg = {}
        if not isinstance(kw_cfg, Mapping):
            raise TypeError(
                f'kw_cfg must be a dict, a WarehouseConfig or None, got {kw_cfg!r}')
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(map(str, kw_cfg)) - set(names))
        if unknown:
            raise ValueError(f'kw_cfg has unknown key(s) {unknown}; it may hold {names}')
        return cls(**{**defaults, **kw_cfg})

    def to_dict(self) -> dict[str, Any]:
        """The fields as a plain dict; ``from_cfg`` takes it back."""
        return asdict(self)

    def for_warehouse(self, index: int, num_warehouses: int) -> WarehouseConfig:
        """The settings of one warehouse: the same object with single values.

        Args:
            index: Which warehouse, from 0.
            num_warehouses: How many the network has.

        Raises:
            ValueError: If a tuple does not have one entry per warehouse.
        """
        single = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                if len(value) != num_warehouses:
                    raise ValueError(
                        f'{field.name} must be one value or a tuple with one entry for each of '
                        f'the {num_warehouses} warehouses, got {len(value)} entries: {value}')
                single[field.name] = value[index]
        return replace(self, **single)


def _positive(name: str, value: Any, upper: float = math.inf) -> Any:
    expected = 'a finite number > 0' if upper == math.inf else f'a number in (0, {upper}]'
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be {expected} (or a tuple of such), got {value!r}')
    if not 0 < float(value) <= upper or math.isinf(value):  # NaN compares false
        raise ValueError(f'{name} must be {expected} (or a tuple of such), got {value!r}')
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f'spatial_partition must be True or False (or a tuple of such), '
                        f'got {value!r}')
    return value
