"""Whether the Triton kernels can be used, and what their files share. Imports without Triton.

The kernels have been compiled for compute capability 8.0 and 9.0 and checked with Triton's
interpreter on a CPU; they have not run on a GPU yet.
"""
from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from .autocast import autocast_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The first with fast bfloat16; what came before is not worth a path of its own.
LEAST_CAPABILITY = (8, 0)

# An operator of its own keeps a launch out of the compiler's sight: no break in the graph, and
# the interpreter's kernels, which torch.compile cannot trace, work as well. triton_op would let
# the compiler look inside, but calls interpreted kernels with fake tensors. Not custom_op, whose
# own autograd layer takes longer than a small kernel.
_library = torch.library.Library('kw_mm', 'FRAGMENT')


def is_usable(*tensors: Tensor) -> bool:
    """Tells whether the functions in ``triton_assembly`` and ``triton_attention`` take these.

    They need Triton, torch 2.4, and tensors of a supported dtype, all on one CUDA device of
    capability 8.0 or more; with ``TRITON_INTERPRET=1`` in the environment before Triton is
    imported, on any one device, but not of bfloat16, which the interpreter multiplies wrongly.
    Their modules can only be imported where Triton is installed.

    Args:
        tensors: All that the function will be given; at least one.
    """
    device = tensors[0].device
    if not all(t.device == device and t.dtype in DTYPES for t in tensors) or not _is_installed():
        return False
    if _is_interpreted():
        return all(t.dtype != torch.bfloat16 for t in tensors)
    # Nobody has tried them on AMD's, which torch calls CUDA devices as well.
    return (device.type == 'cuda' and torch.version.hip is None
            and _capability(device.index) >= LEAST_CAPABILITY)


def compute_dtype(**tensors: Tensor) -> torch.dtype:
    """The dtype of a product of some tensors: autocast's where that is on, otherwise theirs.

    As for torch's own products, autocast leaves float64 alone. Nothing is cast here: kernels
    cast what they have loaded, and neither copy nor second pass over the cells is needed.

    Args:
        tensors: By the names that the error is to show; at least one.

    Raises:
        ValueError: If their dtypes differ, or are none of ``DTYPES``.
    """
    dtypes = {t.dtype for t in tensors.values()}
    device_type = next(iter(tensors.values())).device.type
    autocast = autocast_dtype(device_type)
    if autocast is not None:
        dtypes = {d if d == torch.float64 else autocast for d in dtypes}
    if len(dtypes) != 1 or not dtypes.issubset(DTYPES):
        raise ValueError(f'{", ".join(tensors)} must have one floating-point dtype, got '
                         f'{", ".join(str(t.dtype) for t in tensors.values())}')
    return dtypes.pop()


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for a compute dtype; obeys torch's switch for TF32."""
    is_tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return 'tf32' if is_tf32 else 'ieee'


def block(size: int, least: int, most: int) -> int:
    """The power of two that holds ``size``, within two others; tl.dot needs 16 at least."""
    return min(max(1 << (size - 1).bit_length(), least), most)


def register(schema: str, function: Callable, fake: Callable) -> None:
    """Registers an operator ``kw_mm::<name>``.

    Args:
        schema: Name, arguments and result, as ``torch.library.define`` takes them.
        function: Computes it, on any device.
        fake: Returns an empty result, of the same shape, strides and dtype.
    """
    name = schema[:schema.index('(')]
    _library.define(schema)
    for key in ('CPU', 'CUDA'):
        _library.impl(name, function, key)
    torch.library.register_fake(f'kw_mm::{name}', fake, lib=_library)


# The three below are constants to torch.compile, which would not trace what they ask.


@torch.compiler.assume_constant_result
def _is_installed() -> bool:
    return find_spec('triton') is not None and hasattr(torch.library, 'register_fake')


@torch.compiler.assume_constant_result
def _is_interpreted() -> bool:
    if os.environ.get('TRITON_INTERPRET', '0') == '0':
        return False  # and Triton, slow to import, is not needed on a CPU
    # The environment counted when Triton was imported.
    import triton
    return not isinstance(triton.language.cdiv, triton.runtime.JITFunction)


@torch.compiler.assume_constant_result
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
