"""Which workloads are measured, and what they are meant to reach."""
from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from .setting import Setting

KINDS = ('inference', 'training', 'memory')


@dataclass(frozen=True)
class Workload:
    """What a network is given to do.

    Args:
        kind: ``'inference'``, ``'training'`` (a step), or ``'memory'`` (its peak in a step).
        batch: Images.
        height: Of each image.
        width: Of each image.
        setting: Where and in which precision.

    Raises:
        ValueError: If the kind is unknown.
    """

    kind: str
    batch: int
    height: int
    width: int
    setting: Setting = Setting()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f'kind must be one of {KINDS}, got {self.kind!r}')

    @property
    def shape(self) -> tuple[int, int, int]:
        """Batch, height and width."""
        return (self.batch, self.height, self.width)

    @property
    def name(self) -> str:
        """Kind, shape and, where it is not single precision, the setting."""
        name = f'{self.kind} {self.batch}x3x{self.height}x{self.width}'
        return name if self.setting.label == 'float32' else f'{name}, {self.setting.label}'


def parse_shape(text: str) -> tuple[int, int, int]:
    """Batch, height and width from ``'2x480x640'``; channels, ``'2x3x480x640'``, may be there.

    Raises:
        ValueError: If it is anything else.
    """
    found = re.fullmatch(r'(\d+)x(?:3x)?(\d+)x(\d+)', text)
    numbers = tuple(map(int, found.groups())) if found else (0,)
    if min(numbers) < 1:
        raise ValueError(f'a shape must be BATCHxHEIGHTxWIDTH, as 2x480x640, got {text!r}')
    return numbers


# What KW-R50 is meant to cost over static R50, by its budget.
Goals = dict[float, float]

PAPER_CPU: dict[Workload, Goals] = {
    Workload('inference', 1, 224, 224): {1: 2.6, 4: 3.5},
    Workload('inference', 8, 224, 224): {1: 1.8, 4: 2.0},
    Workload('inference', 1, 800, 1344): {1: 1.06, 4: 1.10},
    Workload('training', 2, 480, 640): {1: 1.2, 4: 1.5},
    Workload('memory', 2, 800, 1344): {1: 1.10, 4: 1.35},
}


def paper_gpu(device: str = 'cuda', dtype: torch.dtype = torch.bfloat16, compile: bool = False,
              cuda_graphs: bool = False) -> dict[Workload, Goals]:
    """The workloads of a GPU, with their goals.

    Args:
        device: As torch names it.
        dtype: Of inference, and what autocast computes training in.
        compile: Whether networks go through ``torch.compile``.
        cuda_graphs: Whether inference is captured once and replayed.
    """
    inference = Setting(device, dtype, channels_last=True, compile=compile,
                        cuda_graphs=cuda_graphs)
    training = Setting(device, dtype, amp=True, compile=compile)
    return {
        **{Workload('inference', batch, 800, 1344, inference): {1: 1.15, 4: 1.25}
           for batch in (1, 2, 4, 8, 16)},
        **{Workload('training', batch, 800, 1344, training): {1: 1.2, 4: 1.3}
           for batch in (2, 4, 8, 16)},
        Workload('memory', 2, 800, 1344, Setting(device)): {1: 1.10, 4: 1.35},
    }
