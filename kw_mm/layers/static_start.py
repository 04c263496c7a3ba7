"""A static start: KW layers compute the same as given static layers, at temperature 0.

At first the attention does not depend on its input (fc2 has zero weights), and its logits reproduce
the static kernels. There are two cases, by warehouse:

- Every mixture is tied to a cell of its own (b >= 1). The cell is that piece of the kernel, scaled
  up because normalised logits sum to less than 1. This is exact.
- There are more mixtures than cells (b < 1). The pieces of all layers are the rows of one matrix,
  and the cells come from its best approximation of rank n, a truncated singular value
  decomposition.
"""
from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..ops import cut_kernel, mixing_weights
from ..ops.autocast import widest_dtype
from ..ops.reference import EPS
from ..plan import LayerPlan, Warehouse
from ..table import format_table
from .attention import is_plain

if TYPE_CHECKING:
    from .conv import _KWConvNd
    from .warehouse import WarehouseManager

# Logits of the cell that a mixture starts from, and of the zero cell. alpha is then 1 / 1.0003, for
# which the cells are scaled up at temperature 0. Towards temperature 1, where beta is used instead,
# each layer is too strong by that factor, which adds up to 1 % after 50 layers. A larger SELECT
# reduces this, but the effect of every logit is divided by SELECT. With 4, about the initial sum of
# magnitudes of random logits, the attention learns as fast as from scratch; with many cells SELECT
# grows (see ``select_logit``). The zero cell's logit must not be 0, because |z| has no gradient
# there and the column might never change; the larger it is, the larger the error.
SELECT = 4.0
ZERO = 2e-4
# So many cells the logit SELECT can stand against.
SELECT_CELLS = 10

# The part of the mixing weights' L1 norm, at most 1, that approximated mixtures leave to the zero
# cell, so that its logit is positive and well away from the kink at 0.
MARGIN = 0.05

# Kernels that differ by less than HARMLESS are as good as the static ones. From SPOILT on, hardly
# anything is left of what the network predicted (docs/conversion.md has the figures).
HARMLESS, SPOILT = 1e-3, 0.1

LayerWeights = tuple['_KWConvNd', Tensor, Tensor | None]


@dataclass(frozen=True)
class WarehouseStart:
    """How well one warehouse reproduces the static kernels, measured on the stored tensors.

    Attributes:
        warehouse: Its index in its plan.
        layers: Names of its layers.
        num_cells: Cells n.
        num_mixtures: Mixtures of all layers.
        exact: Whether every mixture has a cell of its own.
        error: ``|kernels - static kernels| / |static kernels|`` over all layers (Frobenius); NaN
            on the meta device.
        optimum: The smallest error that n cells allow: 0, or a bound from the singular values.
    """

    warehouse: int
    layers: tuple[str, ...]
    num_cells: int
    num_mixtures: int
    exact: bool
    error: float
    optimum: float


@dataclass(frozen=True)
class StartReport:
    """What ``start_from_static_`` did; prints as a table, with what it is worth for b < 1."""

    warehouses: tuple[WarehouseStart, ...]

    @property
    def exact(self) -> bool:
        """Whether no warehouse had to approximate."""
        return all(start.exact for start in self.warehouses)

    @property
    def warning(self) -> str | None:
        """What the start is worth where cells are too few (b < 1); None if kernels are as before.

        A warehouse that differs much spoils the network, however exact the others are.
        """
        poor = [start for start in self.warehouses if start.error > HARMLESS]
        if not poor:
            return None
        worst = max(poor, key=lambda start: start.error)
        text = (f'Fewer cells than pieces of kernels (b < 1) in {len(poor)} of '
                f'{len(self.warehouses)} warehouses: their kernels differ from the static ones by '
                f'{median(start.error for start in poor):.1%} (median; the worst by '
                f'{worst.error:.1%}, from {worst.layers[0] or "the layer"} on). ')
        if worst.error < SPOILT:
            return text + 'The network predicts something else than before; measure how much.'
        return text + ('Nothing is left of what the static network predicts; take b >= 1 for a '
                       'start that is exact.')

    @property
    def level(self) -> int:
        """The level at which logs tell it."""
        return logging.WARNING if self.warning else logging.INFO

    def __str__(self) -> str:
        rows = [(str(start.warehouse), start.layers[0] or '-', str(len(start.layers)),
                 f'{start.num_cells:,}', f'{start.num_mixtures:,}',
                 'exact' if start.exact else 'approximated', f'{start.error:.2e}',
                 f'{start.optimum:.2e}') for start in self.warehouses]
        table = format_table(('warehouse', 'first layer', 'layers', 'cells', 'mixtures', 'start',
                              'error', 'optimum'), rows, right=(2, 3, 4, 6, 7))
        return f'{table}\n{self.warning}' if self.warning else table


@torch.no_grad()
def start_from_static_(layers: Iterable[LayerWeights]) -> StartReport:
    """Sets cells, attentions and biases so that KW layers compute what static ones do.

    It is computed in float64 and rounded to the layers' own dtype. Tensors that are not needed keep
    their random values: fc1 and norm1, fc3, and cells that no mixture starts from. A later
    ``init_weights`` of the layers does nothing.

    Args:
        layers: KW convolutions, each with its static weight ``(out, in / groups, *k)`` and bias
            ``(out,)`` or None. For a linear layer, pass its child ``conv``; its weight may be
            ``(out, in)``. All layers of a warehouse must be included.

    Returns:
        How well each warehouse reproduces the static kernels.

    Raises:
        ValueError: If a layer of a warehouse is missing, a weight or bias does not have the layer's
            shape, or fc2 of an attention was pruned, wrapped or replaced. Nothing is changed then.
    """
    by_manager: dict[WarehouseManager, dict[str, LayerWeights]] = {}
    for layer, weight, bias in layers:
        weight = _check_shapes(layer, weight, bias)
        _check_attention(layer)
        by_manager.setdefault(layer.manager, {})[layer.plan.spec.name] = (layer, weight, bias)
    starts = []
    for manager, given in by_manager.items():
        for index, warehouse in enumerate(manager.plan.warehouses):
            names = [planned.spec.name for planned in warehouse.layers]
            missing = [name for name in names if name not in given]
            if len(missing) == len(names):
                continue
            if missing:
                raise ValueError(f'layers must hold all that share warehouse {index}, but '
                                 f'{missing} are missing')
            starts.append((index, warehouse, [given[name] for name in names]))
    return StartReport(tuple(_start_warehouse(*start) for start in starts))


@torch.no_grad()
def start_at_zero_(layer: _KWConvNd, bias: Tensor | None) -> None:
    """Makes the kernels of one KW convolution zero at temperature 0, with any cells.

    All of the attention goes to the zero cell. Cells are not changed, because other layers may
    share them. The other logits are 0 and have gradients, so that training changes the kernels at
    once. A later ``init_weights`` of the layer does nothing.

    Args:
        layer: The convolution; for a linear layer, its child ``conv``.
        bias: ``(out,)`` or None.

    Raises:
        ValueError: If the bias does not have the layer's shape, or fc2 of the attention was pruned,
            wrapped or replaced.
    """
    _check_bias(layer, bias)
    _check_attention(layer)
    logits = layer.cells.new_zeros(layer.plan.num_mixtures, layer.plan.num_cells + 1)
    logits[:, -1] = SELECT
    _set_logits_(layer, logits)
    if layer.bias is not None and bias is not None:
        layer.bias.copy_(bias)
    layer.is_init = True


def select_logit(num_cells: int) -> float:
    """The logit of the cell that a mixture starts from, in a warehouse of so many cells.

    Adam moves each logit by about the learning rate in a step, whatever its gradient, and mixing
    weights are divided by the sum of all magnitudes. So n cells that are still random thin the
    start out n times as fast as one. The logit grows with n, so that the mixing weights move as
    they do with ten cells. For Adam that is the same as a smaller learning rate of the attention's
    last layer, and needs nothing of the optimizer's settings.
    """
    return SELECT * max(1.0, num_cells / SELECT_CELLS)


def cut_static(weight: Tensor, plan: LayerPlan) -> Tensor:
    """One row for each mixture of a static kernel, ``(m, c_out * c_in * prod(cell kernel))``."""
    return cut_kernel(weight[None], plan.grid, plan.cell_shape).flatten(4).flatten(0, 3)


def _start_warehouse(index: int, warehouse: Warehouse,
                     members: Sequence[LayerWeights]) -> WarehouseStart:
    cells = members[0][0].cells
    exact = all(None not in planned.assignment.columns for planned in warehouse.layers)
    for layer, _, bias in members:
        if layer.bias is not None and bias is not None:
            layer.bias.copy_(bias)
        # Keeps mmengine from letting the layer draw new weights.
        layer.is_init = True
    report: dict[str, Any] = dict(
        warehouse=index, layers=tuple(p.spec.name for p in warehouse.layers),
        num_cells=warehouse.num_cells, num_mixtures=warehouse.num_mixtures, exact=exact)
    if cells.is_meta:
        return WarehouseStart(**report, error=math.nan, optimum=0.0 if exact else math.nan)
    pieces = [cut_static(weight.to(cells.device, widest_dtype(cells.device)), layer.plan)
              for layer, weight, _ in members]
    if exact:
        optimum = 0.0
        for (layer, _, _), rows in zip(members, pieces):
            _set_exactly_(layer, rows)
    else:
        optimum = _approximate_(members, pieces)
    return WarehouseStart(**report, error=_error(members, pieces), optimum=optimum)


def _set_exactly_(layer: _KWConvNd, pieces: Tensor) -> None:
    columns = list(layer.plan.assignment.columns)
    rows = range(len(columns))
    logits = pieces.new_zeros(len(columns), layer.plan.num_cells + 1)
    logits[rows, columns] = select_logit(layer.plan.num_cells)
    logits[:, -1] = ZERO
    _set_logits_(layer, logits)
    # The mixing weights of the stored logits, in the layer's own dtype.
    alpha = _alpha(layer)[rows, columns]
    layer.cells[columns] = (pieces / alpha[:, None]).view(-1, *layer.plan.cell_shape).to(
        layer.cells)


def _approximate_(members: Sequence[LayerWeights], pieces: Sequence[Tensor]) -> float:
    """Approximates, and returns the smallest relative error that the cells allow."""
    cells = members[0][0].cells
    rows = torch.cat(list(pieces))
    left, singular = _left_svd(rows)
    rank = int((singular > singular[0] * max(rows.shape) * torch.finfo(rows.dtype).eps).sum())
    rank = min(rank, len(cells))
    # All cells have the same norm, like random ones, so the coefficients contain the singular
    # values.
    weights = left[:, :rank] * singular[:rank]
    basis = left[:, :rank].T @ rows / singular[:rank, None]
    set_mixtures_([layer for layer, _, _ in members],
                  weights.split([len(part) for part in pieces]), basis)
    norm = singular.norm()
    return (singular[len(cells):].norm() / norm).item() if norm > 0 else 0.0


@torch.no_grad()
def set_mixtures_(layers: Sequence[_KWConvNd], weights: Sequence[Tensor], cells: Tensor) -> None:
    """Sets what all layers of a warehouse mix, the same for every input, at temperature 0.

    Args:
        layers: The layers.
        weights: The weight of each cell in each mixture, ``(m, k)`` for each layer.
        cells: ``(k, ...)``, the first k of the warehouse. Further ones keep their values and are
            not used.
    """
    stored = layers[0].cells
    rank = len(cells)
    # Cells are scaled up until the largest L1 norm of a row of weights is allowed.
    norm = max(part.abs().sum(1).max().item() for part in weights) if rank else 0.0
    stretch = norm / (1 - MARGIN) or 1.0
    stored[:rank] = (stretch * cells).view(-1, *stored.shape[1:]).to(stored)
    for layer, part in zip(layers, weights):
        alpha = part.new_zeros(len(part), len(stored))
        alpha[:, :rank] = part / stretch
        # The rest goes to the zero cell, so that the magnitudes of all rows sum to SELECT.
        zero = SELECT * (1 - alpha.abs().sum(1, keepdim=True)) - EPS
        _set_logits_(layer, torch.cat((SELECT * alpha, zero), 1))


def _left_svd(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of ``(M, D)``.

    If rows are long, it is computed from the triangular factor, because the right vectors, as large
    as the matrix, are not needed, and the Gram matrix would lose half of the digits.
    """
    if rows.shape[0] < rows.shape[1]:
        rows = torch.linalg.qr(rows.T, mode='r').R.T
    left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    return left, singular


def _set_logits_(layer: _KWConvNd, logits: Tensor) -> None:
    """Sets the attention's logits ``(m, n + 1)``, the same for every input."""
    attention = layer.attention
    attention.fc2.weight.zero_()
    bias = attention.fc2.bias if attention.basis_bias is None else attention.basis_bias
    bias.copy_(logits.flatten())


def _alpha(layer: _KWConvNd) -> Tensor:
    """The mixing weights ``(m, n)`` at temperature 0 with zero fc2, in high precision."""
    attention = layer.attention
    bias = attention.fc2.bias if attention.basis_bias is None else attention.basis_bias
    logits = bias.view(1, attention.num_mixtures, -1)
    alpha = mixing_weights(logits, attention.beta, torch.zeros_like(attention.tau))[0]
    return alpha.to(widest_dtype(alpha.device))


def _error(members: Sequence[LayerWeights], pieces: Sequence[Tensor]) -> float:
    cells = members[0][0].cells.to(pieces[0].dtype).flatten(1)
    wrong: Any = sum((_alpha(layer) @ cells - rows).square().sum()
                for (layer, _, _), rows in zip(members, pieces))
    total: Any = sum(rows.square().sum() for rows in pieces)
    return (wrong / total).sqrt().item() if total > 0 else wrong.sqrt().item()


def _check_attention(layer: _KWConvNd) -> None:
    fc2 = layer.attention.fc2
    if not is_plain(fc2):
        raise ValueError(f'fc2 of {_label(layer)} must be the nn.Linear that it was built as, for '
                         'a static start sets its weight; prune, wrap or replace it afterwards; '
                         f'got {fc2}')


def _label(layer: _KWConvNd) -> str:
    name = layer.plan.spec.name
    return f'layer {name!r}' if name else 'the layer'


def _check_shapes(layer: _KWConvNd, weight: Tensor, bias: Tensor | None) -> Tensor:
    spec = layer.plan.spec
    label = _label(layer)
    shape = spec.weight_shape
    if tuple(weight.shape) not in (shape, shape[:2] if math.prod(shape[2:]) == 1 else shape):
        raise ValueError(f'the static weight of {label} must have the shape {shape}, '
                         f'got {tuple(weight.shape)}')
    _check_bias(layer, bias)
    return weight.reshape(shape)


def _check_bias(layer: _KWConvNd, bias: Tensor | None) -> None:
    spec = layer.plan.spec
    if (bias is None) == spec.bias or (
            bias is not None and tuple(bias.shape) != (spec.out_channels,)):
        expected = f'of shape ({spec.out_channels},)' if spec.bias else 'None'
        raise ValueError(f'the static bias of {_label(layer)} must be {expected}, '
                         f'got {bias if bias is None else tuple(bias.shape)}')
