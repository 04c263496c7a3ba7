"""What networks have to do, on which device and in which precision."""
from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ('inference', 'training', 'memory')


@dataclass(frozen=True)
class Setting:
    """Device, precision, layout and the way to run a network; the same for both twins.

    With ``amp``, weights stay in single precision and autocast computes in ``dtype``. ``compile``
    compiles the whole network for fixed shapes; ``cuda_graphs`` captures inference once and replays
    it.
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
        """Whether there is such a device here."""
        return not self.on_cuda or torch.cuda.is_available()

    @property
    def dtype_name(self) -> str:
        """``'float32'``."""
        return str(self.dtype).removeprefix('torch.')

    @property
    def label(self) -> str:
        """Its values in words."""
        words = {'GPU': self.on_cuda, f'AMP {self.dtype_name}': self.amp,
                 self.dtype_name: not self.amp, 'channels last': self.channels_last,
                 'compiled': self.compile, 'CUDA graph': self.cuda_graphs}
        return ', '.join(word for word, holds in words.items() if holds)

    def describe(self) -> dict[str, Any]:
        """Its values, for a report."""
        values = asdict(self)
        return dict(device_type=torch.device(values.pop('device')).type,
                    **dict(values, dtype=self.dtype_name))

    def place(self, value: Any) -> Any:
        """Brings a module (in place) or a 4-d tensor to the device, precision and layout."""
        value = value.to(self.device, torch.float32 if self.amp else self.dtype)
        if self.channels_last and isinstance(value, Tensor):
            return value.contiguous(memory_format=torch.channels_last)
        if self.channels_last:
            # One by one, because a module's own to() refuses cells, which have five dimensions.
            for parameter in value.parameters():
                if parameter.dim() == 4:
                    parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return value

    def autocast(self) -> AbstractContextManager:
        """The context to compute in."""
        if not self.amp:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.device).type, self.dtype)

    def forget_compiled(self) -> None:
        """Makes room for other networks; torch keeps only a few variants of a ``forward``."""
        if self.compile:
            torch.compiler.reset()

    def callable(self, module: nn.Module, x: Tensor | None = None) -> Callable[..., Any]:
        """The function to call for a placed module: compiled, and captured for ``x``, as set."""
        # Completely or not at all, because a partly compiled network would be reported as compiled.
        run = torch.compile(module, fullgraph=True, dynamic=False) if self.compile else module
        if not self.cuda_graphs or x is None:
            return run
        # Choosing and compiling kernels must not be captured, so that happens on a side stream
        # before.
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


@dataclass(frozen=True)
class Workload:
    """What a network has to do.

    The kind is ``'inference'``, ``'training'`` (a step) or ``'memory'`` (the peak in training
    steps).
    """

    kind: str
    batch: int
    height: int
    width: int
    setting: Setting = Setting()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'kind must be one of {KINDS}, got {self.kind!r}')
        if self.setting.cuda_graphs and self.kind != 'inference':
            raise ValueError(f'cuda_graphs captures inference alone, got {self.kind}')
        if self.setting.compile and self.kind == 'memory' and not self.setting.on_cuda:
            raise ValueError('compile must be False for memory on a CPU, where compiling takes '
                             'more of the process than running, got True')

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, height and width."""
        return (self.batch, self.height, self.width)

    @property
    def name(self) -> str:
        """Kind, shape and, if it is not single precision, the setting."""
        name = f'{self.kind} {self.batch}x3x{self.height}x{self.width}'
        return name if self.setting.label == 'float32' else f'{name}, {self.setting.label}'


def parse_shape(text: str) -> tuple[int, int, int]:
    """Batch, height and width from ``'2x480x640'`` or, with the channels, ``'2x3x480x640'``."""
    found = re.fullmatch(r'(\d+)x(?:3x)?(\d+)x(\d+)', text)
    batch, height, width = map(int, found.groups()) if found else (0, 0, 0)
    if min(batch, height, width) < 1:
        raise ValueError(f'a shape must be BATCHxHEIGHTxWIDTH, as 2x480x640, got {text!r}')
    return batch, height, width


def paper_suite(setting: Setting) -> list[Workload]:
    """The standard workloads of the setting's device.

    On a GPU inference is channels-last and training uses mixed precision, whatever the setting
    says. Training steps are not captured, and memory is measured without compilation.
    """
    training = replace(setting, cuda_graphs=False, amp=setting.amp or setting.on_cuda)
    if not setting.on_cuda:
        return [*(Workload('inference', *shape, setting)
                  for shape in ((1, 224, 224), (8, 224, 224), (1, 800, 1344))),
                Workload('training', 2, 480, 640, training),
                Workload('memory', 2, 800, 1344, replace(training, compile=False))]
    inference = replace(setting, channels_last=True)
    return [*(Workload('inference', batch, 800, 1344, inference) for batch in (1, 2, 4, 8, 16)),
            *(Workload('training', batch, 800, 1344, training) for batch in (2, 4, 8, 16)),
            Workload('memory', 2, 800, 1344, Setting(setting.device))]
