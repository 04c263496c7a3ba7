"""From mixing weights and cells to one kernel per sample."""
from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def assemble_kernel(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                    kernel_size: Sequence[int]) -> Tensor:
    """Mixes cells with one matrix product and puts them in place with one copy; see
    ``reference``."""
    num_samples, num_positions, num_out_groups, num_in_groups = len(alpha), *grid
    c_out, c_in, *cell_kernel = cells.shape[1:]
    # One product over all samples: a batched one would read the cells once for each.
    mixtures = alpha.flatten(0, 1) @ cells.flatten(1)
    mixtures = mixtures.view(num_samples, num_positions, num_out_groups, num_in_groups, c_out, c_in,
                             math.prod(cell_kernel))
    # Either the positions or the cells' own extent is 1, so that (S, k) flattens to the kernel.
    kernel = mixtures.permute(0, 2, 4, 3, 5, 1, 6)
    return kernel.reshape(num_samples, num_out_groups * c_out, num_in_groups * c_in, *kernel_size)
