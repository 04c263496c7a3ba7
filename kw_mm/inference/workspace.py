"""Memory that the kernels of one layer after the other are put into."""
from __future__ import annotations

import threading

import torch
from torch import Tensor

from ..ops.autocast import autocast_dtype


class Workspace:
    """Scratch tensors for CPUs, one set for each thread, as large as the largest layer needs.

    The kernels of a batch are hundreds of megabytes. The system hands over memory of that size
    page by page, cleared, and takes it back at once, which costs more than filling it does. Two
    threads that run one model have two sets; a copy of the model starts without any.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def take(self, slot: str, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
        """A contiguous tensor of undefined content, valid until its slot is asked for again.

        Returns:
            None where there is an allocator that keeps memory, a graph that would keep the
            tensor, a compiler that plans memory itself, or autocast, which passes over functions
            that are given a place for their result.
        """
        if (like.device.type != 'cpu' or torch.is_grad_enabled() or torch.compiler.is_compiling()
                or autocast_dtype('cpu')):
            return None
        numel = torch.Size(shape).numel()
        key = slot, like.dtype
        held = vars(self._local)
        if key not in held or held[key].numel() < numel:
            held.pop(key, None)
            # An inference tensor could not be written to outside of inference mode.
            with torch.inference_mode(False):
                held[key] = torch.empty(numel, dtype=like.dtype)
        return held[key][:numel].view(shape)

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()

    def __deepcopy__(self, memo: dict) -> Workspace:
        return Workspace()
