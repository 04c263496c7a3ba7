"""Large tensors on CPUs, from memory that need not be cleared each time.

What is too large for malloc's pools comes from the system page by page, each cleared first, and
goes back at once. To fill a kernel once takes no longer than that. GPUs have an allocator that
keeps memory; for the kernels of one layer after another this one does.
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

    Memory is handed out again when the tensor, and all that shares its memory, is gone: whoever
    keeps one, a graph or another thread, keeps it for itself.
    """
    numel = math.prod(shape)
    num_bytes = numel * dtype.itemsize
    if num_bytes < MIN_KEPT:
        return torch.empty(shape, dtype=dtype)
    piece = _take(num_bytes)
    loan = (ctypes.c_char * len(piece)).from_address(piece.data_ptr())
    # The tensor holds the loan, which holds nothing.
    weakref.finalize(loan, _give_back, piece).atexit = False
    return torch.frombuffer(loan, dtype=dtype, count=numel).view(shape)


def large_empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``torch.empty(shape)`` on the CPU, in few large pages where the system has them on request.

    Those are cleared faster, and found faster when the memory is used.
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
