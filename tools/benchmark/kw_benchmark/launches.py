"""How many kernels a network would have a GPU start, counted without one.

On the meta device nothing is computed, and every operator that the dispatcher is given is seen. A
view starts nothing, and neither does the allocation of memory. An operator of ours counts as what
its implementation for GPUs starts: with torch's products that is counted in the same way, by
running them on the meta device; a Triton kernel is one, and its module declares how many
(``kw_mm.ops.cuda.TRITON_LAUNCHES``), which ``tests/gpu`` compares with a profile where there is a
card.
"""
from __future__ import annotations

import collections
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kw_mm.ops import cuda, products

# They allocate memory, or copy what a host knows along with the launch of another kernel.
STARTS_NOTHING = ('aten::empty', 'aten::new_empty', 'aten::empty_like', 'aten::empty_strided',
                  'aten::new_empty_strided', 'aten::_unsafe_view')


class LaunchCounter(TorchDispatchMode):
    """Counts what runs inside, on the meta device.

    Args:
        with_triton: Whether to count operators of ours as the Triton kernels that they can start,
            or as torch's.

    Attributes:
        counts: Kernels by the name of the operator that starts them.
    """

    def __init__(self, with_triton: bool = False) -> None:
        super().__init__()
        self.with_triton = with_triton
        self.counts: collections.Counter[str] = collections.Counter()

    @property
    def total(self) -> int:
        """All kernels."""
        return sum(self.counts.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition('::')
        kwargs = kwargs or {}
        # What is made of other operators, as a reshape that may copy, comes here undivided from
        # inside of an operator.
        with self:
            parts = func.decompose(*args, **kwargs)
        if parts is not NotImplemented:
            return parts
        if namespace == 'kw_mm' and hasattr(products, name):
            declared = cuda.TRITON_LAUNCHES.get(name) if self.with_triton else None
            if declared is None:
                inner = LaunchCounter()
                with inner:
                    getattr(products, name)(*args, **kwargs)
                declared = inner.total
            self.counts[func._schema.name] += declared
        elif not (func.is_view or func._schema.name in STARTS_NOTHING):
            self.counts[func._schema.name] += 1
        out = func(*args, **kwargs)
        if name == 'convolution' and not args[0].is_contiguous() and args[0].stride(1) == 1:
            # As cuDNN answers; the meta device would go on with a contiguous map.
            out = out.movedim(1, -1).contiguous().movedim(-1, 1)
        return out


def count_launches(module: nn.Module, x: Tensor, with_triton: bool = False) -> LaunchCounter:
    """Kernels of one inference of a module on the meta device, in the mode that it is in.

    Raises:
        ValueError: If the input is on another device.
    """
    if not x.is_meta:
        raise ValueError(f'x must be on the meta device, where nothing is computed, got {x.device}')
    with torch.no_grad(), LaunchCounter(with_triton) as counter:
        module(x)
    return counter
