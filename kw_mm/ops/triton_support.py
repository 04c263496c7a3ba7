"""Whether the Triton kernels can be used, and how. Imports without Triton.

The kernels have been compiled for compute capability 8.0, 9.0 and 10.0 and checked with Triton's
interpreter on a CPU; on a GPU they have run, but were not compared with the method.
"""
from __future__ import annotations

import functools
import os
from importlib.util import find_spec

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The first with fast bfloat16.
LEAST_CAPABILITY = (8, 0)


def is_usable(*tensors: Tensor) -> bool:
    """Whether the functions in ``triton_assembly`` take these tensors.

    They need Triton, and tensors of a supported dtype, all on one CUDA device of
    capability 8.0 or more; with ``TRITON_INTERPRET=1`` in the environment before Triton is
    imported, on any one device, but not of bfloat16, which the interpreter multiplies wrongly.
    That module can only be imported where Triton is installed.

    Args:
        tensors: All tensors for the function; at least one.
    """
    device = tensors[0].device
    if not all(t.device == device and t.dtype in DTYPES for t in tensors) or not _is_installed():
        return False
    if _is_interpreted():
        return all(t.dtype != torch.bfloat16 for t in tensors)
    # Untested on AMD's GPUs, which torch calls CUDA devices as well.
    return (device.type == 'cuda' and torch.version.hip is None
            and _capability(device.index) >= LEAST_CAPABILITY)


def dot_precision(dtype: torch.dtype) -> str:
    """Triton's ``input_precision`` for a compute dtype; obeys torch's switch for TF32."""
    if dtype != torch.float32:
        return 'ieee'
    matmul = torch.backends.cuda.matmul
    # New in torch 2.9. Once it is set, reading allow_tf32 is an error.
    precision = getattr(matmul, 'fp32_precision', None)
    is_tf32 = matmul.allow_tf32 if precision is None else precision == 'tf32'
    return 'tf32' if is_tf32 else 'ieee'


def block(size: int, least: int, most: int) -> int:
    """The power of two that holds ``size``, within two others; tl.dot needs 16 at least."""
    return min(max(1 << (size - 1).bit_length(), least), most)


@functools.cache
def _is_installed() -> bool:
    return find_spec('triton') is not None


@functools.cache
def _is_interpreted() -> bool:
    if os.environ.get('TRITON_INTERPRET', '0') == '0':
        return False  # and Triton, slow to import, is not needed on a CPU
    # Triton read the environment when it was imported.
    import triton
    return not isinstance(triton.language.cdiv, triton.runtime.JITFunction)


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
