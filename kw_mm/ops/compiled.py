"""The products of assembly on a CPU, in C++ that the installation compiled (``cpu.cpp``).

Libraries of matrix products are slow for few rows and very many columns: they first copy both
matrices into an order of their own, which here takes as long as the product. These functions read
cells from where they are and write mixtures to their final place.

C++ reads and writes raw memory. For safety every tensor first passes through ``_in_rows``, which
copies it if its memory is not as the C++ expects.
"""
from __future__ import annotations

import ctypes
import functools
import hashlib
import math
import os
import platform
import sysconfig
import warnings
from ctypes import c_char_p, c_int, c_long, c_void_p
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

# Rows of a block must have at least so many numbers to fill a register; torch does the rest.
MIN_BLOCK_ROW = 16
# Less work than this many multiply-adds is not worth a second thread.
WORK_PER_THREAD = 2**16
# The instruction sets of compiled files, by the names that torch has for them, best first.
INSTRUCTION_SETS = {'AVX512': 'avx512', 'AVX2': 'avx2'}

_is_wanted = os.environ.get('KW_MM_CPU_PRODUCTS', '1') not in ('', '0')


class _Mix(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, c_long) for name in ('num_blocks', 'num_rows', 'num_cells', 'width')),
        ('alpha', c_void_p), ('alpha_block', c_long), ('alpha_row', c_long),
        ('cells', c_void_p), ('cells_block', c_long), ('cells_cell', c_long),
        ('cells_are_bfloat16', c_long), ('index', c_void_p), ('scales', c_void_p),
        ('out', c_void_p), ('out_block', c_long), ('out_rows', c_void_p)]


class _Sums(ctypes.Structure):
    _fields_: ClassVar[Any] = [
        *((name, c_long) for name in ('num_rows', 'num_cells', 'size')),
        ('grads', c_void_p), ('grads_row', c_long),
        ('cells', c_void_p), ('cells_cell', c_long), ('out', c_void_p)]


def use_cpu_products(enabled: bool = True) -> None:
    """Allows the compiled products from now on, or forbids them.

    ``KW_MM_CPU_PRODUCTS=0`` in the environment does the latter from the start.
    """
    global _is_wanted
    _is_wanted = enabled


def mixes(cells: Tensor, dtype: torch.dtype) -> bool:
    """Whether ``mix_blocks`` may be called: compiled, allowed, and made for such dtypes."""
    return (_is_wanted and dtype == torch.float32
            and cells.dtype in (torch.float32, torch.bfloat16) and instruction_set() is not None)


def sums(grads: Tensor, cells: Tensor) -> bool:
    """Whether ``sum_products`` may be called: compiled, allowed, and made for such dtypes."""
    return (_is_wanted and grads.dtype == cells.dtype == torch.float32
            and instruction_set() is not None)


def instruction_set() -> str | None:
    """The instruction set of the compiled products in use, or None if there are none."""
    library = _library()
    return None if library is None else library[0]


def mix_blocks(alpha: Tensor, blocks: Tensor, out: Tensor, index: Tensor | None = None,
               scales: Tensor | None = None) -> None:
    """Writes mixtures of cells, block by block.

    Args:
        alpha: ``(R, n)``, or ``(B, R, n)`` where blocks differ.
        blocks: ``(B, n, width)``, in single precision or in bfloat16.
        out: Where to, ``(B, *rows, width)`` with R rows in any number of dimensions; numbers of a
            row one after the other. New memory, which nothing else refers to.
        index: Those of the n cells that are to be read, in int64; by default all.
        scales: Factors of the mixtures, ``(B, R)``; by default 1.

    Raises:
        ValueError: If shapes or dtypes do not fit, or ``out`` is not such memory.
    """
    num_blocks, num_stored, width = blocks.shape
    num_rows = alpha.shape[-2]
    _check('alpha', alpha, (num_blocks, num_rows, num_stored)[-alpha.dim():])
    _check('blocks', blocks, blocks.shape)
    _check('out', out, (num_blocks, *out.shape[1:-1], width))
    if out.dtype != torch.float32 or not _has_rows(out) or math.prod(out.shape[1:-1]) != num_rows:
        raise ValueError('out must be single-precision memory with a contiguous row for each of '
                         f"alpha's {num_rows}, got {tuple(out.shape)} of {out.dtype}")
    if index is not None:
        index = index.to(torch.int64).contiguous()
        alpha = alpha.index_select(-1, index)
    if scales is not None:
        scales = scales.to(torch.float32).contiguous()
        _check('scales', scales, (num_blocks, num_rows))
    alpha, num_cells = _in_rows(alpha), alpha.shape[-1]
    is_bfloat16 = blocks.dtype == torch.bfloat16
    blocks = _in_rows(blocks, blocks.dtype if is_bfloat16 else torch.float32)
    # A variable keeps them alive, because other threads may remove them from the cache.
    starts = _row_starts(tuple(out.shape[1:-1]), out.stride()[1:-1])
    mix = _Mix(
        num_blocks, num_rows, num_cells, width,
        alpha.data_ptr(), alpha.stride(0) if alpha.dim() == 3 else 0, alpha.stride(-2),
        blocks.data_ptr(), blocks.stride(0), blocks.stride(1), is_bfloat16,
        None if index is None else index.data_ptr(),
        None if scales is None else scales.data_ptr(),
        out.data_ptr(), out.stride(0), ctypes.addressof(starts))
    if out.numel():
        _functions().kw_mm_mix(ctypes.byref(mix), _num_threads(out.numel() * num_cells))


def sum_products(grads: Tensor, cells: Tensor) -> Tensor:
    """``grads @ cells.T``: ``(R, D)`` and ``(n, D)`` to ``(R, n)``.

    Raises:
        ValueError: If shapes do not fit.
    """
    grads, cells = _in_rows(grads), _in_rows(cells)
    _check('cells', cells, (len(cells), grads.shape[1]))
    out = torch.empty(len(grads), len(cells))
    sums = _Sums(*out.shape, grads.shape[1], grads.data_ptr(), grads.stride(0),
                 cells.data_ptr(), cells.stride(0), out.data_ptr())
    _functions().kw_mm_sum_products(
        ctypes.byref(sums), _num_threads(out.numel() * grads.shape[1]))
    return out


def _in_rows(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The tensor, or a copy, in a dtype and with the numbers of each row side by side.

    Rows themselves may be anywhere, even in the same place.
    """
    tensor = tensor.to(dtype)
    return tensor if _has_rows(tensor) else tensor.contiguous()


def _has_rows(tensor: Tensor) -> bool:
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def _check(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.device.type != 'cpu' or tensor.shape != shape:
        raise ValueError(f'{name} must be of shape {tuple(shape)} on the CPU, got '
                         f'{tuple(tensor.shape)} on {tensor.device}')


def _num_threads(work: int) -> int:
    return max(1, min(torch.get_num_threads(), work // WORK_PER_THREAD))


@functools.lru_cache(maxsize=1024)
def _row_starts(shape: tuple[int, ...], strides: tuple[int, ...]) -> ctypes.Array:
    starts = [0]
    for size, stride in zip(shape, strides):
        starts = [start + i * stride for start in starts for i in range(size)]
    return (c_long * len(starts))(*starts)


@functools.lru_cache(maxsize=1)
def _library() -> tuple[str, ctypes.CDLL] | None:
    if platform.machine() not in ('x86_64', 'AMD64'):
        return None
    names = list(INSTRUCTION_SETS)
    capability = torch.backends.cpu.get_cpu_capability()
    for name in names[names.index(capability):] if capability in names else ():
        library = load(name)
        if library is not None:
            return name, library
    return None


def _functions() -> ctypes.CDLL:
    """The compiled functions, for a caller that knows that they are there."""
    found = _library()
    assert found is not None
    return found[1]


def load(instruction_set: str) -> ctypes.CDLL | None:
    """The file compiled for an instruction set, which the machine must have.

    Returns:
        None if there is no such file, or, with a warning, if it was built from another version of
        ``cpu.cpp``, whose structures may differ.
    """
    name = f'_cpu_{INSTRUCTION_SETS[instruction_set]}'
    path = Path(__file__).with_name(name + sysconfig.get_config_var('EXT_SUFFIX'))
    if not path.is_file():
        return None
    library = ctypes.CDLL(str(path))
    built_from = getattr(library, 'kw_mm_built_from', None)
    if built_from is not None:
        built_from.argtypes, built_from.restype = (), c_char_p
    if built_from is None or built_from().decode() != source_hash():
        warnings.warn(
            f'{path.name} was compiled from another version of kw_mm and is not used: torch '
            'computes instead, slower. Compile it again: pip install --no-build-isolation '
            '--no-deps --force-reinstall kw_mm, or in a checkout make env, or there pip install '
            '--no-build-isolation --no-deps -e .', RuntimeWarning, stacklevel=2)
        return None
    for function in (library.kw_mm_mix, library.kw_mm_sum_products):
        function.argtypes, function.restype = (c_void_p, c_int), None
    return library


def source_hash() -> str:
    """The hash of ``cpu.cpp`` beside this file; ``setup.py`` compiles it into the library."""
    source = Path(__file__).with_name('cpu.cpp')
    if not source.is_file():
        return 'missing'
    # Copying the file may have changed its line ends.
    return hashlib.sha256(b'\n'.join(source.read_bytes().splitlines())).hexdigest()[:16]
