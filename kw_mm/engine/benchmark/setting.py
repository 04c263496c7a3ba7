"""Where and in which precision networks run."""
from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Setting:
    """Device, precision, layout, and how a network is run there; the same for both twins.

    Args:
        device: As torch names it.
        dtype: Of weights and images; with ``amp`` of what autocast computes in.
        amp: Whether weights stay in single precision, and autocast chooses.
        channels_last: Whether images and weights are laid out channels last.
        compile: Whether networks go through ``torch.compile``.
        cuda_graphs: Whether inference is captured once and replayed.

    Raises:
        ValueError: If CUDA graphs are asked for on another device.
    """

    device: str = 'cpu'
    dtype: torch.dtype = torch.float32
    amp: bool = False
    channels_last: bool = False
    compile: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.cuda_graphs and not self.on_cuda:
            raise ValueError(f"cuda_graphs needs a device of type 'cuda', got {self.device!r}")

    @property
    def on_cuda(self) -> bool:
        """Whether the device is a GPU."""
        return torch.device(self.device).type == 'cuda'

    @property
    def at_hand(self) -> bool:
        """Whether there is such a device."""
        return not self.on_cuda or torch.cuda.is_available()

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of parameters and images."""
        return torch.float32 if self.amp else self.dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of products."""
        return self.dtype

    def place(self, value: Any) -> Any:
        """A module (in place) or a 4-d tensor on the device, in its precision and layout."""
        value = value.to(self.device, self.weight_dtype)
        if self.channels_last and isinstance(value, Tensor):
            return value.contiguous(memory_format=torch.channels_last)
        if self.channels_last:
            # One by one: a module's own to() refuses cells, which have five dimensions.
            for parameter in value.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return value

    def autocast(self) -> AbstractContextManager:
        """The context to compute in."""
        if not self.amp:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, self.dtype)

    def callable(self, module: nn.Module, x: Tensor | None = None) -> Callable[..., Any]:
        """A module as it is called: compiled or captured if so asked.

        Args:
            module: Placed, in the mode it will run in.
            x: Input to capture inference with; without it, nothing is captured.
        """
        run = torch.compile(module) if self.compile else module
        if not self.cuda_graphs or x is None:
            return run
        # Kernels are chosen and compiled on a side stream, which capture must not see.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode(), self.autocast():
            for _ in range(3):
                run(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), self.autocast(), torch.cuda.graph(graph):
            outputs = run(x)

        def replay(_: Tensor) -> Any:
            graph.replay()
            return outputs

        return replay

    @property
    def label(self) -> str:
        """Its values in words."""
        dtype = str(self.dtype).removeprefix('torch.')
        words = {'GPU': self.on_cuda, f'AMP {dtype}': self.amp, dtype: not self.amp,
                 'channels last': self.channels_last, 'compiled': self.compile,
                 'CUDA graph': self.cuda_graphs}
        return ', '.join(word for word, holds in words.items() if holds)

    def describe(self) -> dict[str, Any]:
        """Its values, for a report."""
        return dict(device_type=torch.device(self.device).type,
                    dtype=str(self.dtype).removeprefix('torch.'), amp=self.amp,
                    channels_last=self.channels_last, compile=self.compile,
                    cuda_graphs=self.cuda_graphs)
