"""The products of assembly on a CPU, in C++ that the installation compiled.

A few rows against very many numbers is what libraries of matrix products are slowest at: they
bring both matrices into an order of their own, which here takes as long as the product. These
functions read the cells where they lie and put mixtures where they belong.

Where there was no compiler, and for what they cannot take, torch's own products serve: see
``backend``.
"""
from __future__ import annotations

import ctypes
import functools
import platform
import sysconfig
from collections.abc import Callable
from ctypes import c_int, c_long, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor

# Numbers of a block from which its rows fill a register. Narrower ones are left to torch.
MIN_WIDTH = 16
# Less work than this many multiply-adds is not worth a second thread.
WORK_PER_THREAD = 2**16
# The instruction sets of compiled files, by the names that torch has for them, best first.
INSTRUCTION_SETS = {'AVX512': 'avx512', 'AVX2': 'avx2'}
# Bytes that malloc never keeps for later, and what Linux calls its large pages, on x86.
MIN_LARGE, HUGE_PAGE, MADV_HUGEPAGE = 2**25, 2**21, 14


class _Mix(ctypes.Structure):
    _fields_ = [(name, c_long) for name in ('num_blocks', 'num_rows', 'num_cells', 'width')] + [
        ('alpha', c_void_p), ('alpha_block', c_long), ('alpha_row', c_long),
        ('cells', c_void_p), ('cells_block', c_long), ('cells_cell', c_long),
        ('index', c_void_p), ('scales', c_void_p),
        ('out', c_void_p), ('out_block', c_long), ('out_rows', c_void_p)]


class _Sums(ctypes.Structure):
    _fields_ = [(name, c_long) for name in ('num_rows', 'num_cells', 'size')] + [
        ('grads', c_void_p), ('grads_row', c_long),
        ('cells', c_void_p), ('cells_cell', c_long), ('out', c_void_p)]


def instruction_set() -> str | None:
    """What the compiled products are made for that this machine takes; None if there are none."""
    library = _library()
    return None if library is None else library[0]


def mix_blocks(alpha: Tensor, blocks: Tensor, out: Tensor, index: Tensor | None = None,
               scales: Tensor | None = None) -> Tensor:
    """Mixtures of cells, block by block.

    Args:
        alpha: ``(R, n)``, or ``(B, R, n)`` where blocks differ.
        blocks: ``(B, cells, width)``; numbers of a row one after the other, else any strides.
        out: ``(B, *rows, width)`` with R rows in any number of dimensions; strides likewise. Must
            not overlap.
        index: The n cells that alpha is about, ``(n,)``; by default all.
        scales: Factors of the mixtures, ``(B, R)``; by default 1.

    Returns:
        ``out``.
    """
    alpha = alpha if alpha.stride(-1) == 1 else alpha.contiguous()
    num_rows, num_cells = alpha.shape[-2:]
    scales = None if scales is None else scales.contiguous()
    # Held by name, for other threads may push them out of the cache.
    starts = _row_starts(tuple(out.shape[1:-1]), out.stride()[1:-1])
    mix = _Mix(
        len(blocks), num_rows, num_cells, blocks.shape[2],
        alpha.data_ptr(), alpha.stride(0) if alpha.dim() == 3 else 0, alpha.stride(-2),
        blocks.data_ptr(), blocks.stride(0), blocks.stride(1),
        None if index is None else index.data_ptr(),
        None if scales is None else scales.data_ptr(),
        out.data_ptr(), out.stride(0), ctypes.addressof(starts))
    if out.numel():
        _library()[1].kw_mm_mix(ctypes.byref(mix), _num_threads(out.numel() * num_cells))
    return out


def sum_products(grads: Tensor, cells: Tensor) -> Tensor:
    """``grads @ cells.T``: ``(R, D)`` and ``(n, D)`` to ``(R, n)``; rows have numbers in order."""
    out = grads.new_empty(len(grads), len(cells))
    sums = _Sums(*out.shape, grads.shape[1], grads.data_ptr(), grads.stride(0),
                 cells.data_ptr(), cells.stride(0), out.data_ptr())
    _library()[1].kw_mm_sum_products(
        ctypes.byref(sums), _num_threads(out.numel() * grads.shape[1]))
    return out


def large_empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """``like.new_empty(shape)``, in few large pages where the system has them on request.

    What is too large for a memory pool comes from the system page by page, each cleared first.
    For a matrix that is written once that takes as long as to compute it.
    """
    out = like.new_empty(shape)
    advise = _madvise()
    if advise is not None and out.device.type == 'cpu' and out.nbytes >= MIN_LARGE:
        start, stop = -(-out.data_ptr() // HUGE_PAGE), (out.data_ptr() + out.nbytes) // HUGE_PAGE
        # Refused where the system has none, and then as it was.
        advise(start * HUGE_PAGE, (stop - start) * HUGE_PAGE, MADV_HUGEPAGE)
    return out


def _num_threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // WORK_PER_THREAD))


@functools.lru_cache(maxsize=1024)
def _row_starts(shape: tuple[int, ...], strides: tuple[int, ...]) -> ctypes.Array:
    starts = [0]
    for size, stride in zip(shape, strides):
        starts = [start + i * stride for start in starts for i in range(size)]
    return (c_long * len(starts))(*starts)


@functools.lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    if platform.system() != 'Linux' or platform.machine() != 'x86_64':
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = c_void_p, c_size_t, c_int
    return madvise


@functools.lru_cache(maxsize=1)
def _library() -> tuple[str, ctypes.CDLL] | None:
    names = list(INSTRUCTION_SETS)
    capability = torch.backends.cpu.get_cpu_capability()
    for name in names[names.index(capability):] if capability in names else ():
        library = load(name)
        if library is not None:
            return name, library
    return None


def load(instruction_set: str) -> ctypes.CDLL | None:
    """The file compiled for an instruction set, which the machine must have; None if there is
    none."""
    name = f'_cpu_products_{INSTRUCTION_SETS[instruction_set]}'
    path = Path(__file__).with_name(name + sysconfig.get_config_var('EXT_SUFFIX'))
    if not path.is_file():
        return None
    library = ctypes.CDLL(str(path))
    for function in (library.kw_mm_mix, library.kw_mm_sum_products):
        function.argtypes, function.restype = (c_void_p, c_int), None
    return library
