"""The operators on GPUs: torch's products, and Triton kernels on request.

The Triton kernels have been checked with Triton's interpreter and compiler. They have run on a GPU,
but were not compared with the method there. They are asked for with ``use_triton`` or with
``KW_MM_TRITON=1`` in the environment.
"""
from __future__ import annotations

import os
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from . import products
from .triton_support import is_usable

# How many kernels operators start with Triton. The gradient of mixing weights has its parts added
# up by another one.
TRITON_LAUNCHES = dict(assemble=1, assemble_logits=1, assemble_grad_alpha=2, assemble_grad_cells=1,
                       mix_bases=1)

_triton_is_wanted = os.environ.get('KW_MM_TRITON', '0') not in ('', '0')
_has_warned = False


def use_triton(enabled: bool = True) -> None:
    """Asks for the Triton kernels from now on, or for torch's operators again.

    Tensors that the kernels cannot take (they need a CUDA device of capability 8.0 or more) are
    left to torch, with one warning.
    """
    global _triton_is_wanted, _has_warned
    _triton_is_wanted, _has_warned = enabled, False


def triton_is_wanted() -> bool:
    """Whether the Triton kernels are asked for."""
    return _triton_is_wanted


def assemble(alpha: Tensor, cells: Tensor, grid: Sequence[int], kernel_size: Sequence[int],
             scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See ``operators.assemble``."""
    if not _takes_triton(alpha, cells):
        return products.assemble(alpha, cells, grid, kernel_size, scale, dtype)
    from .triton_assembly import assemble as in_triton
    return in_triton(alpha, cells, grid, kernel_size, scale, dtype)


def assemble_logits(logits: Tensor, beta: Tensor | None, tau: Tensor | None, cells: Tensor,
                    grid: Sequence[int], kernel_size: Sequence[int], scale: Tensor | None,
                    dtype: torch.dtype) -> Tensor:
    """See ``operators.assemble_logits``."""
    if not _takes_triton(logits, cells):
        return products.assemble_logits(logits, beta, tau, cells, grid, kernel_size, scale, dtype)
    from .triton_assembly import assemble_logits as in_triton
    return in_triton(logits, beta, tau, cells, grid, kernel_size, scale, dtype)


def assemble_grad_alpha(pieces: Tensor, cells: Tensor) -> Tensor:
    """See ``operators.assemble_grad_alpha``."""
    if not _takes_triton(pieces, cells):
        return products.assemble_grad_alpha(pieces, cells)
    from .triton_assembly import assemble_grad_alpha as in_triton
    return in_triton(pieces, cells)


def assemble_grad_cells(pieces: Tensor, alpha: Tensor) -> Tensor:
    """See ``operators.assemble_grad_cells``."""
    if not _takes_triton(pieces, alpha):
        return products.assemble_grad_cells(pieces, alpha)
    from .triton_assembly import assemble_grad_cells as in_triton
    return in_triton(pieces, alpha)


def mix_bases(hidden: Tensor, logits: Tensor, bases: Tensor, grid: Sequence[int],
              kernel_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """See ``operators.mix_bases``."""
    if not _takes_triton(hidden, logits, bases):
        return products.mix_bases(hidden, logits, bases, grid, kernel_shape, dtype)
    from .triton_assembly import mix_bases as in_triton
    return in_triton(hidden, logits, bases, grid, kernel_shape, dtype)


def _takes_triton(*tensors: Tensor) -> bool:
    if not _triton_is_wanted:
        return False
    if is_usable(*tensors):
        return True
    # Python's own filter may show a text again, and texts for two dtypes are two texts to it.
    global _has_warned
    if not _has_warned:
        _has_warned = True
        names = ', '.join(f'{t.dtype} on {t.device}' for t in tensors)
        warnings.warn(f'the Triton kernels were asked for but cannot take {names}, or Triton is '
                      'not installed; torch computes instead', RuntimeWarning, stacklevel=3)
    return False
