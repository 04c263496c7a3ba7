"""Which cell each mixture starts from: the matrix beta of the method, as integers."""
from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass


@dataclass(frozen=True)
class Assignment:
    """The cells that belong to one layer, and the mixtures they are tied to.

    Attributes:
        first_cell: Index of the layer's first own cell in the warehouse.
        num_cells: Number of its own cells, which are adjacent; includes spare ones.
        columns: For each mixture the cell it is tied to, or None for the zero cell.
    """

    first_cell: int
    num_cells: int
    columns: tuple[int | None, ...]

    @property
    def stop_cell(self) -> int:
        """One past the layer's last own cell."""
        return self.first_cell + self.num_cells

    @property
    def label(self) -> str:
        """The range of own cells in words."""
        return f'{self.first_cell}..{self.stop_cell - 1}' if self.num_cells else 'none'


def floor(value: float) -> int:
    """``int`` of a positive number, robust to rounding errors just below an integer."""
    return int(value + 1e-9)


def assign_cells(mixtures: Sequence[int], num_cells: int, budget: float) -> list[Assignment]:
    """Ties cells to mixtures, one to one, layer after layer (method, section 3).

    The authors' rule, where it hands out exactly ``num_cells`` cells:

    - ``b >= 1``: each mixture takes the first of the next ``int(b)`` cells;
    - ``b < 1``: with ``r = int(1 / b)``, mixture t of a layer takes the next cell if
      ``t % r == (t // r) % r``, otherwise the zero cell.

    Elsewhere (b = 1.5, 0.3, or a mixture count that r does not divide) a similar rule of our own
    applies:

    - at least as many cells as mixtures: of the M mixtures of all layers, number g takes cell
      ``g * n // M``; no two share one, and a spare cell belongs to the layer of the cell before it;
    - fewer cells: each layer owns a number of cells in proportion to its mixtures, and at least one
      if there are enough. A layer with m mixtures and k cells is cut into k runs of mixtures, and
      in run i the mixture at ``i % length`` takes the cell, all others the zero cell. As in the
      authors' rule, the tied position moves by one from run to run.

    Args:
        mixtures: Mixtures of each layer, in module order.
        num_cells: Cells n of the warehouse, >= 1.
        budget: The budget b that was asked for, > 0.

    Returns:
        One assignment for each layer; together their own cells are ``0 .. n - 1`` in order.
    """
    assignments = _authors_rule(mixtures, budget)
    if assignments[-1].stop_cell == num_cells:
        return assignments
    if num_cells >= sum(mixtures):
        return _spread_spare_cells(mixtures, num_cells)
    return _spread_tied_mixtures(mixtures, num_cells)


def _authors_rule(mixtures: Sequence[int], budget: float) -> list[Assignment]:
    step, period = floor(budget), floor(1 / budget)
    assignments = []
    start = 0
    for count in mixtures:
        if step:
            assignments.append(Assignment(
                start, count * step, tuple(start + t * step for t in range(count))))
        else:
            assignments.append(_tie(
                count, start, {t for t in range(count) if t % period == t // period % period}))
        start = assignments[-1].stop_cell
    return assignments


def _spread_spare_cells(mixtures: Sequence[int], num_cells: int) -> list[Assignment]:
    total = sum(mixtures)
    assignments = []
    seen = 0
    for count in mixtures:
        columns = tuple((seen + t) * num_cells // total for t in range(count))
        seen += count
        stop = seen * num_cells // total
        assignments.append(Assignment(columns[0], stop - columns[0], columns))
    return assignments


def _spread_tied_mixtures(mixtures: Sequence[int], num_cells: int) -> list[Assignment]:
    assignments = []
    start = 0
    for count, own in zip(mixtures, _shares(mixtures, num_cells)):
        tied = set()
        for i in range(own):
            begin, end = -(-i * count // own), -(-(i + 1) * count // own)
            tied.add(begin + i % (end - begin))
        assignments.append(_tie(count, start, tied))
        start += own
    return assignments


def _shares(mixtures: Sequence[int], num_cells: int) -> list[int]:
    """Splits cells over layers in proportion to their mixtures; all get one if there are enough."""
    least = 1 if num_cells >= len(mixtures) else 0
    weights = [count - least for count in mixtures] if least else [1] * len(mixtures)
    total, rest = sum(weights), num_cells - least * len(mixtures)
    shares = []
    seen = 0
    for weight in weights:
        # Shares are differences of rounded-down running sums. So they add up to all cells, and no
        # layer gets more cells than it has mixtures. If total is 0, every layer has one mixture and
        # nothing is left.
        before, seen = seen, seen + weight
        shares.append(least + (seen * rest // total - before * rest // total if total else 0))
    return shares


def _tie(count: int, start: int, tied: Set[int]) -> Assignment:
    """Ties some of ``count`` mixtures to adjacent cells, from cell ``start`` on."""
    cells = iter(range(start, start + len(tied)))
    return Assignment(start, len(tied),
                      tuple(next(cells) if t in tied else None for t in range(count)))
