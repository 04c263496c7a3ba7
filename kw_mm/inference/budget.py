"""Chooses the layers that get bases, by the time these save and the memory they take."""
from __future__ import annotations

import math
from collections.abc import Mapping

from ..plan import LayerPlan

# So many multiply-adds take as long as reading one number from memory, in products of few rows on a
# CPU; measured with ResNet50's cells on two cores.
BALANCE = 10
# Share of the hidden units that a ReLU leaves active.
ACTIVE = 0.5
# With narrower blocks, bases cost more than they save.
MIN_BASIS_INPLANES = 32


def assembly_cost(plan: LayerPlan) -> float:
    """Cost of mixing one kernel from cells, in numbers read from memory."""
    return plan.num_cells * _size(plan) * (1 + plan.num_mixtures / BALANCE)


def bases_cost(plan: LayerPlan) -> float:
    """Cost of mixing one kernel from bases, in the same unit."""
    return (plan.hidden * ACTIVE + 1) * plan.num_mixtures * _size(plan)


def bases_size(plan: LayerPlan) -> int:
    """Numbers in a layer's bases."""
    return (plan.hidden + 1) * plan.num_mixtures * _size(plan)


def choose_layers(plans: Mapping[str, LayerPlan], itemsizes: Mapping[str, int],
                  memory_budget: int) -> list[str]:
    """The layers that bases speed up most per byte, within a budget.

    Args:
        plans: Plans of the layers by name.
        itemsizes: Bytes of one number, by layer.
        memory_budget: Bytes for all bases together.

    Returns:
        Names, those that save most per byte first.
    """
    sizes = {name: bases_size(plan) * itemsizes[name] for name, plan in plans.items()}
    rewards = {name: (assembly_cost(plan) - bases_cost(plan)) / sizes[name]
               for name, plan in plans.items() if plan.cell_shape[1] >= MIN_BASIS_INPLANES}
    chosen = []
    for name in sorted(rewards, key=rewards.__getitem__, reverse=True):
        if rewards[name] > 0 and sizes[name] <= memory_budget:
            chosen.append(name)
            memory_budget -= sizes[name]
    return chosen


def _size(plan: LayerPlan) -> int:
    return math.prod(plan.cell_shape)
