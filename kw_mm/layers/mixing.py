"""What attentions do while a model sees images: where kernels come from, and how they vary."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.autocast import widest_dtype
from ..plan import LayerPlan


class MixingRecord:
    """Mean and second moments of one layer's mixing weights ``(m, n)``, in the widest dtype.

    Attributes:
        count: How many kernels were seen.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Any = 0
        self.moments: Any = 0

    @torch.no_grad()
    def add(self, alpha: Tensor) -> None:
        """Takes notice of mixing weights ``(N, m, n)``."""
        alpha = alpha.detach().to(widest_dtype(alpha.device))
        self.count += len(alpha)
        self.total = self.total + alpha.sum(0)
        self.moments = self.moments + torch.einsum('imn,imk->nk', alpha, alpha)

    @property
    def mean(self) -> Tensor:
        """``(m, n)``."""
        return self.total / self.count

    @torch.no_grad()
    def spread(self, cells: Tensor) -> float:
        """How far kernels are from their mean, as a part of the mean's norm.

        The root of the mean of squares: ``sqrt(mean_i |K_i - mean K|^2) / |mean K|``.
        """
        cells = cells.flatten(1).to(self.mean)
        gram = cells @ cells.T
        square = ((self.mean @ gram) * self.mean).sum()
        around = (self.moments / self.count * gram).sum() - square
        return (around.clamp(min=0) / square).sqrt().item()

    def start_part(self, plan: LayerPlan) -> float:
        """The part of the mixing weights that is still with the cell a mixture is tied to.

        The mean over images and over all mixtures that are tied to a cell, which have all of it at
        a static start with b >= 1; NaN if no mixture is.
        """
        ties = [(row, cell) for row, cell in enumerate(plan.assignment.columns)
                if cell is not None]
        if not ties:
            return float('nan')
        rows, columns = zip(*ties)
        return self.mean[list(rows), list(columns)].mean().item()


@contextmanager
def record_mixing(convs: Iterable[Any]) -> Iterator[dict[nn.Module, MixingRecord]]:
    """Records the mixing weights of KW convolutions for as long as the context lasts.

    Returns:
        A record for each; those of layers that were not called have a ``count`` of 0.
    """
    records = {conv: MixingRecord() for conv in convs}
    with ExitStack() as hooks:
        for conv, record in records.items():
            handle = conv.attention.register_forward_hook(
                lambda _, __, alpha, record=record: record.add(alpha))
            hooks.callback(handle.remove)
        yield records
