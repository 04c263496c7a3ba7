"""Registers functions as operators of PyTorch's dispatcher, with their own gradients.

``torch.library.register_autograd`` is not used, because function transforms (``torch.func``) refuse
it, and a training call through it takes about twice as long. The functions used instead are not
public. If torch lacks any of them, nothing is registered.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._functorch import autograd_function

# All but register_fake, which is public since 2.4, are internals of torch.
_NEEDED = ((torch.library, 'register_fake'), (torch._C, '_AutoDispatchBelowAutograd'),
           (torch._C, '_are_functorch_transforms_active'),
           (torch.autograd.function, '_SingleLevelFunction'),
           (autograd_function, 'enable_single_level_autograd_function'))

_missing = [name for place, name in _NEEDED if not hasattr(place, name)]
if _missing:
    logging.getLogger(__name__).warning(
        'torch %s has no %s: its own products mix kernels, slower and not as operators of kw_mm',
        torch.__version__, ', '.join(_missing))

IS_POSSIBLE = not _missing

# Torch 2.1 and 2.2 have this function here. The compiler has it too, but is slow to import.
is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._utils.is_compiling

# Older versions of torch do not tell. They export what the example takes.
is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)

_library = torch.library.Library('kw_mm', 'DEF')

# A tag since 2.2: the compiler can handle the operator.
_tags: dict[str, Any] = dict(tags=[torch.Tag.pt2_compliant_tag]) if IS_POSSIBLE else {}


def is_recorded() -> bool:
    """Whether this call is recorded in a graph that will get tensors of other sizes."""
    return torch.jit.is_tracing() or is_exporting()


def register_composite(schema: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Registers an operator ``kw_mm::<name>`` that is composed of torch's, with their gradient.

    Args:
        schema: Name, arguments without defaults, and result.
        function: What it computes.

    Returns:
        A function that calls the operator. This works in every version of torch.
    """
    name = schema[:schema.index('(')]
    _library.define(schema, **_tags)
    _library.impl(name, function, 'CompositeImplicitAutograd')
    return getattr(torch.ops.kw_mm, name).default


def register(schema: str, implementations: dict[str, ModuleType], fake: Callable[..., Tensor],
             setup_context: Callable[[Any, tuple], None],
             backward: Callable[..., tuple]) -> Callable[..., Tensor]:
    """Registers an operator ``kw_mm::<name>`` that returns a tensor.

    Args:
        schema: Name, arguments without defaults, and result.
        implementations: Dispatch keys, and the modules that have a function of this name for them.
        fake: Returns an empty result of the same shape, strides and dtype.
        setup_context: Takes a context and the arguments, and keeps what ``backward`` needs.
        backward: Takes the context and the gradient of the result. Returns those of all arguments.

    Returns:
        A function that calls the operator.
    """
    name = schema[:schema.index('(')]
    _library.define(schema, **_tags)
    for key, module in implementations.items():
        _library.impl(name, getattr(module, name), key)
    torch.library.register_fake(f'kw_mm::{name}', fake, lib=_library)
    operator = getattr(torch.ops.kw_mm, name).default

    base: Any = torch.autograd.function._SingleLevelFunction

    class Recorded(base):
        """The operator in a graph of autograd, at any level of transforms."""

        @staticmethod
        def forward(ctx: Any, *args: Any) -> Tensor:
            setup_context(ctx, args)
            # Gradients are off in here, but the next level of transforms may ask for its own.
            with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
                return operator(*args)

    def autograd(*args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(
                isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            if not torch._C._are_functorch_transforms_active():
                return Recorded.apply(*args)
            # This is one level of the transforms. Torch wants to be told so.
            with autograd_function.enable_single_level_autograd_function():
                return Recorded.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    Recorded.backward = staticmethod(backward)
    Recorded.__name__ = f'kw_mm_{name}'
    _library.impl(name, autograd, 'Autograd')

    def call(*args: Any) -> Tensor:
        if (torch.is_grad_enabled() or is_compiling()
                or torch._C._are_functorch_transforms_active()):
            return operator(*args)
        # Autograd has nothing to do; calling it would cost one more way through Python.
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    return call
