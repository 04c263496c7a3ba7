"""The one place that decides between torch's own operators and the Triton kernels.

torch is the default everywhere: the kernels have been checked with Triton's interpreter and
compiler, but have not been timed on a GPU yet. They are asked for with ``use_triton`` or with
``KW_MM_TRITON=1`` in the environment.
"""
from __future__ import annotations

import os
import warnings

from torch import Tensor

from .triton_support import is_usable

_wanted = os.environ.get('KW_MM_TRITON', '0') not in ('', '0')


def use_triton(enabled: bool = True) -> None:
    """Asks for the Triton kernels from now on, or for torch's operators again.

    Tensors that the kernels cannot take (they need a CUDA device of capability 8.0 or more) are
    left to torch, with one warning.
    """
    global _wanted
    _wanted = enabled


def takes_triton(*tensors: Tensor) -> bool:
    """Whether a function is to hand these tensors to its Triton twin."""
    if not _wanted:
        return False
    if is_usable(*tensors):
        return True
    _warn(f'{tensors[0].device} tensors of {tensors[0].dtype}')
    return False


def _warn(what: str) -> None:
    # Shown once: Python's own filter knows a place and a text.
    warnings.warn(f'the Triton kernels were asked for but cannot take {what}, or Triton is not '
                  'installed; torch computes instead', RuntimeWarning, stacklevel=3)
