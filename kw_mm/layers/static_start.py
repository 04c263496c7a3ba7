"""A static start: KW layers that compute what given static layers do, at temperature 0.

The attention begins blind to its input (fc2 has zero weights) with logits that reproduce the
static kernels, and learns from there. Two cases, by warehouse:

- Every mixture is tied to a cell of its own (b >= 1): the cell is that piece of the kernel,
  enlarged by what the normalisation of the logits takes away. Exact.
- Mixtures outnumber cells (b < 1): the pieces of all layers are the rows of one matrix, and the
  cells are its best approximation of rank n, a truncated singular value decomposition.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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

# Logits of the cell that a mixture starts from and of the zero cell. alpha is then 1 / 1.0003,
# which the cells make good at temperature 0; towards 1, where beta takes over, each layer is too
# strong by that much, which comes to 1 % after 50 layers. A larger SELECT lessens it, but every
# logit counts for 1 / SELECT: 4 is no more than the sum of magnitudes that random logits start
# with, so the attention learns as quickly as one from scratch. The zero cell's logit must not be
# 0, where |z| has no gradient and the column might never move, and adds to the error as it grows.
SELECT = 4.0
ZERO = 2e-4

# Of the L1 ball that mixing weights live in, left to the zero cell by the approximated mixtures:
# its logit stays positive and well away from the kink at 0.
MARGIN = 0.05

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
        optimum: The least such error that n cells allow: 0, or what the singular values say.
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
    """What ``start_from_static_`` did; prints as a table."""

    warehouses: tuple[WarehouseStart, ...]

    @property
    def exact(self) -> bool:
        """Whether no warehouse had to approximate."""
        return all(start.exact for start in self.warehouses)

    def __str__(self) -> str:
        rows = [(str(start.warehouse), start.layers[0] or '-', str(len(start.layers)),
                 f'{start.num_cells:,}', f'{start.num_mixtures:,}',
                 'exact' if start.exact else 'approximated', f'{start.error:.2e}',
                 f'{start.optimum:.2e}') for start in self.warehouses]
        return format_table(('warehouse', 'first layer', 'layers', 'cells', 'mixtures', 'start',
                             'error', 'optimum'), rows, right=(2, 3, 4, 6, 7))


@torch.no_grad()
def start_from_static_(layers: Iterable[LayerWeights]) -> StartReport:
    """Sets cells, attentions and biases so that KW layers compute what static ones do.

    Computed in float64 and rounded to the layers' own dtype in the end. What is not needed keeps
    its random values: fc1 and norm1, fc3, and cells that no mixture starts from. A later
    ``init_weights`` of the layers does nothing.

    Args:
        layers: KW convolutions, each with its static weight ``(out, in / groups, *k)`` and bias
            ``(out,)`` or None. A linear layer is given by its child ``conv``, and its weight may
            be ``(out, in)``. Every layer of a warehouse must be among them.

    Returns:
        How well each warehouse does.

    Raises:
        ValueError: If a layer of a warehouse is missing, a weight or bias has not the layer's
            shape, or fc2 of an attention was pruned, wrapped or replaced. Nothing was changed then.
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
    """Makes the kernels of one KW convolution zero at temperature 0, whatever its cells are.

    All of the attention goes to the zero cell; cells are left alone, for others may share them.
    The other logits are 0 and have gradients, so that training moves the kernels at once. A later
    ``init_weights`` of the layer does nothing.

    Args:
        layer: The convolution; a linear layer is given by its child ``conv``.
        bias: ``(out,)`` or None.

    Raises:
        ValueError: If the bias has not the layer's shape, or fc2 of the attention was pruned,
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
        # For mmengine, which would otherwise have the layer draw its weights anew.
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
    logits[rows, columns] = SELECT
    logits[:, -1] = ZERO
    _set_logits_(layer, logits)
    # What the stored logits come to in the layer's own dtype.
    alpha = _alpha(layer)[rows, columns]
    layer.cells[columns] = (pieces / alpha[:, None]).view(-1, *layer.plan.cell_shape).to(
        layer.cells)


def _approximate_(members: Sequence[LayerWeights], pieces: Sequence[Tensor]) -> float:
    """Returns the least relative error that the cells allow."""
    cells = members[0][0].cells
    rows = torch.cat(list(pieces))
    left, singular = _left_svd(rows)
    rank = int((singular > singular[0] * max(rows.shape) * torch.finfo(rows.dtype).eps).sum())
    rank = min(rank, len(cells))
    # Cells of one length, as random ones are, and coefficients that carry the singular values;
    # stretched until the row of largest L1 norm fits into the ball.
    weights = left[:, :rank] * singular[:rank]
    stretch = weights.abs().sum(1).max().item() / (1 - MARGIN) if rank else 1.0
    basis = left[:, :rank].T @ rows / singular[:rank, None]
    cells[:rank] = (stretch * basis).view(-1, *cells.shape[1:]).to(cells)
    alpha = rows.new_zeros(len(rows), len(cells))
    alpha[:, :rank] = weights / stretch
    # What is left goes to the zero cell, so that the logits' normaliser is SELECT in every row.
    zero = SELECT * (1 - alpha.abs().sum(1, keepdim=True)) - EPS
    logits = torch.cat((SELECT * alpha, zero), 1)
    for (layer, _, _), part in zip(members, logits.split([len(p) for p in pieces])):
        _set_logits_(layer, part)
    norm = singular.norm()
    return (singular[len(cells):].norm() / norm).item() if norm > 0 else 0.0


def _left_svd(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and singular values of ``(M, D)``.

    Through the triangular factor where rows are long: the right vectors, as large as the matrix,
    are not needed, and the Gram matrix would lose half of the digits.
    """
    if rows.shape[0] < rows.shape[1]:
        rows = torch.linalg.qr(rows.T, mode='r').R.T
    left, singular, _ = torch.linalg.svd(rows, full_matrices=False)
    return left, singular


def _set_logits_(layer: _KWConvNd, logits: Tensor) -> None:
    """Makes the attention's logits ``(m, n + 1)``, whatever its input."""
    attention = layer.attention
    attention.fc2.weight.zero_()
    bias = attention.fc2.bias if attention.basis_bias is None else attention.basis_bias
    bias.copy_(logits.flatten())


def _alpha(layer: _KWConvNd) -> Tensor:
    """The mixing weights ``(m, n)`` at temperature 0 with fc2's weights at zero, precisely."""
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
