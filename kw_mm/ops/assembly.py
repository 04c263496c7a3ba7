"""From mixing weights and cells to one kernel per sample."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import operators
from .autocast import autocast_to
from .cell_gradients import assemble_collected, is_collected


def assemble_kernel(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                    kernel_size: Sequence[int], scale: Tensor | None = None) -> Tensor:
    """Mixes cells to kernels; see ``reference``. Under autocast they have its dtype.

    Cells that ``collect_gradients`` returned get the gradient of all their uses at once.

    Args:
        alpha: ``(N, m, n)``.
        cells: ``(n, c_out, c_in, *k)``.
        grid: ``(S, OG, IG)``.
        kernel_size: Of the kernel.
        scale: Factors of the kernel's output channels, ``(OG * c_out,)``, or None for 1.

    Returns:
        Kernels, ``(N, OG * c_out, IG * c_in, *kernel_size)``.
    """
    if scale is None and is_collected(cells):
        return assemble_collected(alpha, cells, grid, kernel_size)
    return operators.assemble(alpha, autocast_to(cells), grid, kernel_size, scale)
