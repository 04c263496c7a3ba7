"""The one place that decides between torch's own operators and our kernels.

The compiled products are the default on CPUs that have them. On GPUs torch is the default
everywhere: the Triton kernels have been checked with Triton's interpreter and compiler, but have
not been timed on a GPU yet. They are asked for with ``use_triton`` or with ``KW_MM_TRITON=1`` in
the environment.
"""
from __future__ import annotations

import os
import warnings

import torch
from torch import Tensor, nn

from . import cpu_products
from .triton_support import is_usable

_triton_is_wanted = os.environ.get('KW_MM_TRITON', '0') not in ('', '0')
_cpu_products_are_wanted = os.environ.get('KW_MM_CPU_PRODUCTS', '1') not in ('', '0')

# Not all are in torch 2.1.
_transforms_are_active = getattr(torch._C, '_are_functorch_transforms_active', lambda: False)
_num_dispatch_modes = getattr(torch._C, '_len_torch_dispatch_stack', lambda: 0)


def use_triton(enabled: bool = True) -> None:
    """Asks for the Triton kernels from now on, or for torch's operators again.

    Tensors that the kernels cannot take (they need a CUDA device of capability 8.0 or more) are
    left to torch, with one warning.
    """
    global _triton_is_wanted
    _triton_is_wanted = enabled


def takes_triton(*tensors: Tensor) -> bool:
    """Whether a function is to hand these tensors to its Triton twin."""
    if not _triton_is_wanted:
        return False
    if is_usable(*tensors):
        return True
    _warn(f'{tensors[0].device} tensors of {tensors[0].dtype}')
    return False


def use_cpu_products(enabled: bool = True) -> None:
    """Takes the compiled products from now on where they can be, or torch's own alone.

    ``KW_MM_CPU_PRODUCTS=0`` in the environment does the latter from the start.
    """
    global _cpu_products_are_wanted
    _cpu_products_are_wanted = enabled


def takes_cpu_products(*tensors: Tensor) -> bool:
    """Whether a function is to hand these tensors to ``cpu_products``.

    They must be memory of the CPU in single precision, seen by no graph, compiler, tracer,
    transform or mode.
    """
    return (_cpu_products_are_wanted and all(map(_is_plain, tensors)) and not _is_watched()
            and cpu_products.instruction_set() is not None)


def is_transformed() -> bool:
    """Whether a compiler or a function transform is at work, to which only torch's own functions
    mean anything."""
    return torch.compiler.is_compiling() or _transforms_are_active()


def _is_plain(tensor: Tensor) -> bool:
    return (type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == 'cpu'
            and tensor.dtype == torch.float32 and tensor.layout == torch.strided
            and not (tensor.requires_grad and torch.is_grad_enabled()))


def _is_watched() -> bool:
    return (is_transformed() or torch.jit.is_tracing() or _num_dispatch_modes() > 0
            or torch.autograd.forward_ad._current_level >= 0)


def _warn(what: str) -> None:
    # Shown once: Python's own filter knows a place and a text.
    warnings.warn(f'the Triton kernels were asked for but cannot take {what}, or Triton is not '
                  'installed; torch computes instead', RuntimeWarning, stacklevel=3)
