"""The order in which cells lie in memory."""
from __future__ import annotations

import math

from torch import Tensor

# A row of a cell that has at least so many numbers is a block of its own in a product.
MIN_ROW = 256
# With at least so many cells, reading them dominates the cost of a product of few rows.
MIN_CELLS = 32


def reads_by_rows(cells: Tensor) -> bool:
    """Whether ``assemble_kernel`` is faster with cells ``(n, c_out, c_in, *k)`` stored by rows.

    It mixes cells row by row, and then one row of all cells is contiguous. That helps the caches of
    CPUs.
    """
    return (cells.device.type == 'cpu' and len(cells) >= MIN_CELLS
            and math.prod(cells.shape[2:]) >= MIN_ROW)


def store_by_rows(cells: Tensor) -> Tensor:
    """A copy of the same shape, with memory in the order ``(c_out, n, c_in, *k)``."""
    return cells.transpose(0, 1).contiguous().transpose(0, 1)


def stored_by_rows(cells: Tensor) -> bool:
    """Whether cells lie in memory as ``store_by_rows`` leaves them."""
    return cells.shape[1] > 1 and cells.stride(1) > cells.stride(0)
