"""Prints a plan: a table, and the layers that stayed static."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from .table import format_table

if TYPE_CHECKING:
    from .plan import WarehousePlan

MAX_NAMES = 6  # of static layers, printed for one reason


def describe_plan(plan: WarehousePlan) -> str:
    """A line for each layer, the parameters of all, and why layers stayed static."""
    rows = []
    for index, warehouse in enumerate(plan.warehouses):
        shared = (str(index), f'{warehouse.num_cells} x {_times(warehouse.cell_shape)}')
        for layer in warehouse.layers:
            rows.append((
                *shared, layer.spec.name or '-', _times(layer.spec.weight_shape),
                f'{layer.num_mixtures:,}', layer.assignment.label,
                f'{layer.num_attention_parameters:,}'))
            shared = ('', '')  # only the first line of a warehouse names it
    return '\n'.join((
        format_table(('warehouse', 'cells', 'layer', 'weight', 'mixtures', 'own cells',
                      'attention'), rows, right=(4, 6)),
        f'{_counted(len(plan.layers), "layer")} share{"s" * (len(plan.layers) == 1)} '
        f'{_counted(len(plan.warehouses), "warehouse")}: '
        f'{plan.num_parameters:,} parameters ({plan.num_cell_parameters:,} in cells, '
        f'{plan.num_attention_parameters:,} in attention); static: '
        f'{plan.num_static_parameters:,}',
        *describe_static(plan.static)))


def describe_static(static: Iterable[tuple[str, str]]) -> Iterator[str]:
    """One line for each reason why layers stayed static, from pairs of name and reason."""
    reasons: dict[str, list[str]] = {}
    for name, reason in static:
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        more = f', ... ({len(names)} layers)' if len(names) > MAX_NAMES else ''
        yield f'static, {reason}: {", ".join(names[:MAX_NAMES])}{more}'


def _times(shape: Iterable[int]) -> str:
    return 'x'.join(map(str, shape))


def _counted(num: int, what: str) -> str:
    return f'{num} {what}{"s" * (num != 1)}'
