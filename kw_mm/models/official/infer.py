"""From the shapes of a checkpoint back to the ``kw_cfg`` that gives them.

Sizes are ratios of known numbers, rounded down (method, sections 2 and 3), so that each tensor
bounds a ratio from both sides. All tensors vote, for one of them may be wrong.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement
from typing import Any

from ...config import WarehouseConfig
from ...plan import MIN_WIDTH, ConvSpec

Shapes = Mapping[str, tuple[int, ...]]

# Taken where shapes allow it, rather than the simplest fraction.
_USUAL = dict(cell_inplane_ratio=Fraction(1), cell_outplane_ratio=Fraction(1),
              reduction=Fraction(1, 16), nonlocal_basis_ratio=Fraction(1, 16))


@dataclass(frozen=True)
class Bound:
    """What one size says of a ratio: ``max(int(scale * ratio), least) == size``, ``< below``."""

    scale: int
    size: int
    least: int
    below: float = math.inf

    @property
    def low(self) -> Fraction:
        """The smallest ratio, 0 where any small one will do."""
        return Fraction(self.size, self.scale) if self.size > self.least else Fraction(0)

    @property
    def high(self) -> Fraction:
        """The first ratio that is too large."""
        return min(Fraction(self.size + 1, self.scale), self.below)

    def allows(self, ratio: Fraction) -> bool:
        """Tells whether a ratio gives the size."""
        return self.low <= ratio < self.high

    def is_met_by(self, ratio: float) -> bool:
        """The same in the arithmetic of the plan."""
        return max(int(self.scale * ratio), self.least) == self.size


def infer_kw_cfg(warehouses: Sequence[Sequence[ConvSpec]], shapes: Shapes,
                 default_norm: str) -> Iterator[dict[str, Any]]:
    """Yields configs that may have given the shapes, the simplest first.

    The first has one value for all warehouses in every field, the others a tuple where the shapes
    of some warehouses ask for one: in the plane ratios, in the rest, in both.

    Args:
        warehouses: The layers of each warehouse.
        shapes: Of the backbone's state-dict entries. Missing and wrong ones are outvoted.
        default_norm: ``attn_norm`` of the backbone, which a config need not repeat.
    """
    cells = [shapes.get(f'warehouse_manager.weights.{i}', ()) for i in range(len(warehouses))]
    cells = [shape if len(shape) == 5 else None for shape in cells]
    fixed: dict[str, Any] = {}
    norm = _attention_norm(shapes) or default_norm
    if norm != default_norm:
        fixed['attn_norm'] = norm
    partition = _spatial_partition(warehouses, cells)
    if not all(partition):
        fixed['spatial_partition'] = partition if any(partition) else False

    seen = []
    for planes in _choices({
            field: [[] if cell is None else list(_plane_bounds(specs, cell, axis))
                    for specs, cell in zip(warehouses, cells)]
            for field, axis in (('cell_inplane_ratio', 1), ('cell_outplane_ratio', 0))}):
        for rest in _choices(dict(
                cell_num_ratio=[
                    list(_budget_bounds(specs, cell and cell[0], shapes, sizes))
                    for specs, cell, sizes in zip(
                        warehouses, cells, _cell_sizes(warehouses, fixed, planes))],
                reduction=[list(_reduction_bounds(specs, shapes)) for specs in warehouses],
                nonlocal_basis_ratio=[list(_basis_bounds(specs, shapes))
                                      for specs in warehouses])):
            kw_cfg = _without_defaults({**rest, **planes, **fixed})
            if kw_cfg not in seen:
                seen.append(kw_cfg)
                yield kw_cfg


def _choices(bounds: Mapping[str, Sequence[Sequence[Bound]]]) -> Iterator[dict[str, Any]]:
    """Fields with the ratios that their bounds suggest: one for all warehouses, one for each."""
    shared = {}
    for field, per_warehouse in bounds.items():
        ratio = _vote([b for w in per_warehouse for b in w], _USUAL.get(field))
        if ratio is not None:
            shared[field] = ratio
    yield {field: _number(ratio, [b for w in bounds[field] for b in w])
           for field, ratio in shared.items()}
    each = {}
    for field, ratio in shared.items():
        own = [ratio if all(b.allows(ratio) for b in w) else _vote(w, _USUAL.get(field)) or ratio
               for w in bounds[field]]
        numbers = tuple(_number(r, w) for r, w in zip(own, bounds[field]))
        each[field] = numbers if len(set(numbers)) > 1 else numbers[0]
    yield each


def _cell_sizes(warehouses: Sequence[Sequence[ConvSpec]], fixed: Mapping[str, Any],
                planes: Mapping[str, Any]) -> Iterator[int]:
    """Numbers in a cell of each warehouse, as the config says and not the cells themselves."""
    config = WarehouseConfig(**fixed, **planes)
    for index, specs in enumerate(warehouses):
        own = config.for_warehouse(index, len(warehouses))
        kernel = 1 if own.spatial_partition else math.prod(specs[0].kernel_size)
        c_out, c_in = (
            max(int(math.gcd(*(spec.weight_shape[axis] for spec in specs)) * ratio), 1)
            for axis, ratio in ((0, own.cell_outplane_ratio), (1, own.cell_inplane_ratio)))
        yield c_out * c_in * kernel


def _attention_norm(shapes: Shapes) -> str | None:
    statistics = sum(key.endswith('attention.norm1.running_mean') for key in shapes)
    biases = sum(key.endswith('attention.fc1.bias') for key in shapes)
    if not statistics and not biases:
        return None
    return 'BN1d' if statistics >= biases else 'LN'


def _budget_bounds(specs: Sequence[ConvSpec], num_cells: int | None, shapes: Shapes,
                   cell_size: int) -> Iterator[Bound]:
    """From the cells, and from the attentions, which have a column for each and one more."""
    mixtures = [math.prod(spec.weight_shape) // cell_size for spec in specs]
    sizes = [num_cells] if num_cells else []
    for spec, count in zip(specs, mixtures):
        rows = shapes.get(f'{spec.name}.attention.basis_bias') or shapes.get(
            f'{spec.name}.attention.fc2.bias')
        if rows and count and rows[0] // count > 1:
            sizes.append(rows[0] // count - 1)
    if sum(mixtures):
        yield from (Bound(sum(mixtures), size, 1) for size in sizes)


def _plane_bounds(specs: Sequence[ConvSpec], cell: tuple[int, ...], axis: int) -> Iterator[Bound]:
    bound = Bound(math.gcd(*(spec.weight_shape[axis] for spec in specs)), cell[1 + axis], 1)
    if 0 < bound.size <= bound.scale:
        yield bound


def _reduction_bounds(specs: Iterable[ConvSpec], shapes: Shapes) -> Iterator[Bound]:
    for spec in specs:
        shape = shapes.get(f'{spec.name}.attention.fc1.weight', ())
        if len(shape) == 2 and shape[1] == spec.in_channels and shape[0] >= MIN_WIDTH:
            yield Bound(spec.in_channels, shape[0], MIN_WIDTH)


def _basis_bounds(specs: Sequence[ConvSpec], shapes: Shapes) -> Iterator[Bound]:
    for spec in specs:
        shape = shapes.get(f'{spec.name}.attention.fc3.weight', ())
        if len(shape) == 2 and shape[0] and shape[1] >= MIN_WIDTH:
            yield Bound(shape[0], shape[1], MIN_WIDTH, below=1)
        # A layer with a warehouse of its own has no basis whatever the ratio.
        elif len(specs) > 1 and f'{spec.name}.attention.fc2.bias' in shapes:
            yield Bound(1, 1, 0)


def _spatial_partition(warehouses: Sequence[Sequence[ConvSpec]],
                       cells: Sequence[tuple[int, ...] | None]) -> tuple[bool, ...]:
    """False where cells are whole kernels of more than one position."""
    return tuple(
        cell is None or math.prod(cell[3:]) == 1 or {s.kernel_size for s in specs} != {cell[3:]}
        for specs, cell in zip(warehouses, cells))


def _vote(bounds: Sequence[Bound], usual: Fraction | None) -> Fraction | None:
    """The ratio that most bounds allow; among equals the usual one, then the simplest."""
    if not bounds:
        return None
    proposals = {usual} - {None}
    # All together, or if one of them is wrong any two.
    for some in ([bounds], combinations_with_replacement(set(bounds), 2)):
        for group in some:
            low, high = max(b.low for b in group), min(b.high for b in group)
            if low < high:
                proposals.add(_simplest(low, high))
    return max(proposals, key=lambda ratio: (sum(bound.allows(ratio) for bound in bounds),
                                             ratio == usual, -ratio.denominator, -ratio))


def _simplest(low: Fraction, high: Fraction) -> Fraction:
    """The fraction > 0 of the smallest denominator with ``low <= fraction < high``."""
    denominator = 1
    while True:
        numerator = max(math.ceil(low * denominator), 1)
        if Fraction(numerator, denominator) < high:
            return Fraction(numerator, denominator)
        denominator += 1


def _number(ratio: Fraction, bounds: Sequence[Bound]) -> int | float:
    """The ratio as a number that gives the sizes: rounding may have put it just below."""
    value = int(ratio) if ratio.denominator == 1 else float(ratio)
    wanted = [bound for bound in bounds if bound.allows(ratio)]
    return value if all(b.is_met_by(value) for b in wanted) else math.nextafter(value, math.inf)


def _without_defaults(kw_cfg: dict[str, Any]) -> dict[str, Any]:
    """Leaves out what ``WarehouseConfig`` says by itself, except for the budget."""
    default = WarehouseConfig().to_dict()
    return {field: value for field, value in kw_cfg.items()
            if field in ('cell_num_ratio', 'attn_norm') or value != default[field]}
