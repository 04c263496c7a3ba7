"""Large tensors on CPUs, from memory that need not be cleared each time.

Memory too large for malloc's pools comes from the system, which clears it page by page, and is
returned at once when freed. Clearing takes as long as filling a kernel. On GPUs torch keeps freed
memory; here this is done for the kernels of one layer after another.
"""
from __future__ import annotations

import ctypes
import functools
import math
import platform
import weakref
from collections.abc import Callable, Sequence
from ctypes import c_int, c_size_t, c_void_p

import torch
from torch import Tensor

# Memory of at least so many bytes is kept.
MIN_KEPT = 2**20
# At most so many unused pieces are kept.
MAX_PIECES = 2
# Malloc returns pieces of at least so many bytes to the system. The others are Linux's names for
# large pages, on x86.
MIN_LARGE, HUGE_PAGE, MADV_HUGEPAGE = 2**25, 2**21, 14

# By address. It needs no lock: a piece belongs to the thread that removes it from the dict.
_free: dict[int, Tensor] = {}


def reused_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty(shape)`` on the CPU, in memory that is kept for the next such tensor.

    Memory is reused when the tensor, and all tensors that share its memory, are gone. A graph or
    thread that keeps a tensor keeps its memory.
    """
    numel = math.prod(shape)
    num_bytes = numel * dtype.itemsize
    if num_bytes < MIN_KEPT:
        return torch.empty(shape, dtype=dtype)
    piece = _take(num_bytes)
    loan = (ctypes.c_char * len(piece)).from_address(piece.data_ptr())
    # The tensor refers to the loan, which must not refer to the tensor.
    weakref.finalize(loan, _give_back, piece).atexit = False
    return torch.frombuffer(loan, dtype=dtype, count=numel).view(shape)


def large_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty(shape)`` on the CPU, in large pages if the system has them.

    Large pages are cleared and accessed faster.
    """
    out = torch.empty(shape, dtype=dtype)
    advise = _madvise()
    if advise is not None and out.nbytes >= MIN_LARGE:
        start, stop = -(-out.data_ptr() // HUGE_PAGE), (out.data_ptr() + out.nbytes) // HUGE_PAGE
        # Systems without large pages refuse, which changes nothing.
        advise(start * HUGE_PAGE, (stop - start) * HUGE_PAGE, MADV_HUGEPAGE)
    return out


def _take(num_bytes: int) -> Tensor:
    for address, piece in _by_size():
        if len(piece) >= num_bytes and _free.pop(address, None) is not None:
            return piece
    # Inference tensors could not be written to outside of inference mode.
    with torch.inference_mode(False):
        return large_empty((num_bytes,), torch.uint8)


def _give_back(piece: Tensor) -> None:
    _free[piece.data_ptr()] = piece
    # The largest ones are kept, because they serve every layer.
    for address, _ in _by_size()[:-MAX_PIECES]:
        _free.pop(address, None)


def _by_size() -> list[tuple[int, Tensor]]:
    return sorted(list(_free.items()), key=lambda item: len(item[1]))


@functools.lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    if platform.system() != 'Linux' or platform.machine() != 'x86_64':
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = c_void_p, c_size_t, c_int
    return madvise
