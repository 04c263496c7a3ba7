"""Times of several programs, taken in turns.

``torch.utils.benchmark.Timer`` measures one program after the other and warms up before each
sample. On a shared machine that compares different minutes, and for training steps of seconds it
takes three times as long. Here every round runs each program once, so that a ratio compares times
of the same moment.
"""
from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

# A program: phases by name, run in order. Each phase gets the result of the one before.
Phases = Mapping[str, Callable[[Any], Any]]


class Ratio(NamedTuple):
    """The ratio of two programs' times over all rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f'{self.median:.2f} ({self.low:.2f}..{self.high:.2f})'


@dataclass(frozen=True)
class Times:
    """Seconds of each phase of one program, one entry for each round."""

    phases: Mapping[str, tuple[float, ...]]

    def rounds(self, *names: str) -> tuple[float, ...]:
        """Seconds of some phases together, or of all; one entry for each round."""
        chosen = [self.phases[name] for name in names or self.phases]
        return tuple(map(sum, zip(*chosen)))

    def median(self, *names: str) -> float:
        """The median of ``rounds``, in seconds."""
        return statistics.median(self.rounds(*names))

    def over(self, other: Times, *names: str) -> Ratio:
        """The ratio to another program's times in the same rounds."""
        ratios = [a / b for a, b in zip(self.rounds(*names), other.rounds(*names))]
        return Ratio(statistics.median(ratios), min(ratios), max(ratios))

    def summary(self) -> dict[str, Any]:
        """Medians of the whole and of each phase, and all rounds, as plain data."""
        return dict(total=self.median(), **{phase: self.median(phase) for phase in self.phases},
                    rounds=list(self.rounds()))


def synchronise(device: str) -> None:
    """Waits until the device has finished."""
    if torch.device(device).type == 'cuda':
        torch.cuda.synchronize(device)


def time_in_turns(programs: Mapping[str, Phases], device: str = 'cpu', num_rounds: int = 7,
                  num_warmups: int = 2, min_seconds: float = 0.2) -> dict[str, Times]:
    """Runs programs in turns, A B A B, and takes the time of every phase.

    On CUDA, events are recorded between the phases, so that no phase waits for the one before.

    Each is warmed up, then measured ``num_rounds`` times. A short program is repeated within a
    round to last about ``min_seconds``; its times are the means.
    """
    if num_rounds < 1:
        raise ValueError(f'num_rounds must be an integer >= 1, got {num_rounds!r}')
    repeats = {}
    for name, phases in programs.items():
        for _ in range(max(num_warmups, 1)):
            last = sum(_run(phases, device, 1).values())
        repeats[name] = max(1, math.ceil(min_seconds / max(last, 1e-9)))
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(num_rounds):
            # The order is reversed in every other round, so that no program always runs after the
            # same one.
            for name in list(programs)[::1 if index % 2 == 0 else -1]:
                samples[name].append(_run(programs[name], device, repeats[name]))
    finally:
        if was_enabled:
            gc.enable()
    return {name: Times({phase: tuple(sample[phase] for sample in taken) for phase in taken[0]})
            for name, taken in samples.items()}


def _run(phases: Phases, device: str, repeats: int) -> dict[str, float]:
    """Mean seconds of each phase."""
    on_cuda = torch.device(device).type == 'cuda'
    synchronise(device)
    marks = []
    for _ in range(repeats):
        marks.append([_mark(on_cuda)])
        value = None
        for phase in phases.values():
            value = phase(value)
            marks[-1].append(_mark(on_cuda))
        del value  # otherwise its tensors would exist during the next repeat
    synchronise(device)
    return {name: sum(_elapsed(row[i], row[i + 1]) for row in marks) / repeats
            for i, name in enumerate(phases)}


def _mark(on_cuda: bool) -> Any:
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _elapsed(start: Any, end: Any) -> float:
    return end - start if isinstance(end, float) else start.elapsed_time(end) / 1000
