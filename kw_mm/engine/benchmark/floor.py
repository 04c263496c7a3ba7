"""What a dynamic network cannot cost less than: bytes and operations over the machine's rates.

Beyond the static network a dynamic one has to mix its kernels. This module counts that, and
nothing else: attention, pooling and the convolutions of several kernels are taken as free, so a
floor is a lower bound that no implementation of the counted way gets below on the machine. Every
function is arithmetic on integers; ``machine`` measures the rates.

Symbols: N samples, m mixtures, n cells of D elements, hidden width h.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...plan import LayerPlan

# Of a parameter by SGD with momentum: weight and momentum read and written, gradient read.
SGD_ACCESSES = 5
ACTIVE = 0.5  # part of hidden units that a ReLU leaves open


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        operations: Multiply-adds of a large matrix product, per second.
        bandwidth: Bytes read from (or copied in) memory, per second.
    """

    operations: float
    bandwidth: float


@dataclass(frozen=True)
class Cost:
    """What a computation needs.

    Attributes:
        num_bytes: Bytes to and from memory.
        operations: Multiply-adds.
    """

    num_bytes: int
    operations: int

    def seconds(self, rates: Rates) -> float:
        """The longer of the two, for memory and arithmetic can overlap."""
        return max(self.num_bytes / rates.bandwidth, self.operations / rates.operations)


@dataclass(frozen=True)
class Assembly:
    """The assembly of one layer's kernels for a batch.

    Attributes:
        batch: Samples N.
        mixtures: Mixtures m of the layer.
        cells: Cells n of its warehouse.
        cell_size: Elements D of a cell.
        hidden: Width h of the attention's hidden vector.
        itemsize: Bytes of an element.
    """

    batch: int
    mixtures: int
    cells: int
    cell_size: int
    hidden: int
    itemsize: int = 4

    @classmethod
    def of(cls, plan: LayerPlan, batch: int, itemsize: int = 4) -> Assembly:
        """That of a planned layer."""
        size = 1
        for extent in plan.cell_shape:
            size *= extent
        return cls(batch, plan.num_mixtures, plan.num_cells, size, plan.hidden, itemsize)


def mixing_cells(layer: Assembly) -> Cost:
    """``alpha @ cells``: every cell is read once, ``N m n D`` multiply-adds."""
    return Cost(layer.cells * layer.cell_size * layer.itemsize,
                layer.batch * layer.mixtures * layer.cells * layer.cell_size)


def mixing_bases(layer: Assembly) -> Cost:
    """The attention's last linear layer contracted with the cells once, for inference.

    Its weight and bias give ``h + 1`` kernels of the layer's size, which are read once and mixed
    with ``N (h + 1) m D`` multiply-adds.
    """
    size = (layer.hidden + 1) * layer.mixtures * layer.cell_size
    return Cost(size * layer.itemsize, layer.batch * size)


def mixing_active_bases(layer: Assembly) -> Cost:
    """Those bases alone whose hidden units the ReLU has left open, about half of a sample's.

    Of units that are open or not by chance, ``1 - (1 - ACTIVE)^N`` are open for one of N samples:
    so many are read, and each sample mixes its own.
    """
    size = layer.mixtures * layer.cell_size
    read = round((layer.hidden * (1 - (1 - ACTIVE)**layer.batch) + 1) * size)
    return Cost(read * layer.itemsize, round(layer.batch * (layer.hidden * ACTIVE + 1) * size))


def training_cells(layer: Assembly) -> Cost:
    """Mixing cells, forward and backward.

    The gradients of mixing weights and of cells are a product of the forward's size each. Cells
    are read twice, once each way; their gradient, which the layers of a warehouse add to, is read
    and written.
    """
    forward = mixing_cells(layer)
    return Cost(4 * forward.num_bytes, 3 * forward.operations)


def cells_only(layer: Assembly, rates: Rates) -> float:
    """Seconds of a layer's assembly from cells."""
    return mixing_cells(layer).seconds(rates)


def cells_or_bases(layer: Assembly, rates: Rates) -> float:
    """Seconds of a layer's assembly from cells or from bases, whichever is cheaper."""
    return min(mixing_cells(layer).seconds(rates), mixing_bases(layer).seconds(rates))


def cells_or_active_bases(layer: Assembly, rates: Rates) -> float:
    """Seconds of a layer's assembly from cells or from active bases, whichever is cheaper."""
    return min(mixing_cells(layer).seconds(rates), mixing_active_bases(layer).seconds(rates))


# How the kernels of inference can be had, by what a report calls it.
INFERENCE = dict(cells=cells_only, cells_or_bases=cells_or_bases,
                 cells_or_active_bases=cells_or_active_bases)


def training(layer: Assembly, rates: Rates) -> float:
    """Seconds of a layer's assembly and its gradients."""
    return training_cells(layer).seconds(rates)


def total(layers: Iterable[Assembly], rates: Rates,
          way: Callable[[Assembly, Rates], float]) -> float:
    """Seconds of all layers, which come one after another."""
    return sum(way(layer, rates) for layer in layers)


def optimizer(extra_parameters: int, rates: Rates, itemsize: int = 4) -> float:
    """Seconds that SGD with momentum needs for parameters the static network has not.

    Args:
        extra_parameters: How many more there are; with fewer, nothing is saved here.
        rates: Of the machine.
        itemsize: Bytes of a parameter.
    """
    return max(extra_parameters, 0) * SGD_ACCESSES * itemsize / rates.bandwidth
