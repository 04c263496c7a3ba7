"""A run of the benchmark: parity of everything first, then figures, into one report."""
from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from .backbones import Subject, check, compare
from .floor import Rates
from .layers import compare_layers
from .machine import measure_rates
from .parity import SHAPE
from .report import NO_GPU, Report
from .setting import Setting
from .suite import Goals, Workload
from .whole import compare_detectors


@dataclass
class Session:
    """How a run measures, and the report it writes to.

    Attributes:
        report: Filled by the methods.
        memory_budget: For ``optimize_for_inference_``.
        parity_shape: Images of the parity check.
        timing: Options of ``time_in_turns``.
        rating: Options of ``measure_rates``.
        seed: Set before each network is built.
        tell: Is told what comes next.
    """

    report: Report
    memory_budget: int | None = None
    parity_shape: tuple[int, int, int] = SHAPE
    timing: Mapping[str, Any] = field(default_factory=dict)
    rating: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    tell: Callable[[str], None] = print

    def check(self, subjects: Iterable[Subject], settings: Iterable[Setting]) -> None:
        """Compares networks with the reference, in every precision they will run in.

        Raises:
            ParityError: If one differs.
        """
        settings = [s for s in dict.fromkeys(settings) if s.at_hand]
        for subject in subjects:
            for setting in settings:
                name = f'{subject.label}, {setting.label}'
                self.tell(f'parity of {name}')
                torch.manual_seed(self.seed)
                self.report.checks[name] = check(subject, setting, self.memory_budget,
                                                 self.parity_shape)

    def measure(self, subjects: Iterable[Subject], goals: Mapping[Workload, Goals]) -> None:
        """Measures workloads of backbones that were checked."""
        subjects = list(subjects)
        for workload in goals:
            for subject in subjects:
                self.tell(f'{workload.name}, {subject.label}')
                torch.manual_seed(self.seed)
                if workload.setting.at_hand:
                    gc.collect()  # the networks before, whose modules refer to each other
                    row = compare(subject, workload, self.rates(workload.setting),
                                  self.memory_budget, **self.timing)
                else:
                    row = dict(workload=workload.name, kind=workload.kind, budget=subject.budget,
                               missing=NO_GPU)
                goal = goals[workload].get(subject.budget)
                self.report.rows.append(dict(row, backbone=subject.name, goal=goal))

    def measure_layers(self, subjects: Iterable[Subject], workload: Workload) -> None:
        """Measures the layers of backbones that were checked.

        Raises:
            ParityError: If a layer differs from plain torch.
        """
        for subject in subjects:
            torch.manual_seed(self.seed)
            for row in compare_layers(subject, workload, self.rates(workload.setting),
                                      self.memory_budget, **self.timing):
                self.tell(f'{row["layer"]}, {subject.label}')
                self.report.layers.append(row)

    def measure_detectors(self, kw_config: str, static_config: str, shape: tuple[int, int, int],
                          setting: Setting) -> None:
        """Compares the KW backbone of a detector with the reference, then measures.

        Raises:
            ParityError: If it differs.
        """
        self.tell(f'{kw_config} and {static_config}')
        torch.manual_seed(self.seed)
        checks, rows = compare_detectors(kw_config, static_config, shape, setting,
                                         self.memory_budget, self.parity_shape, **self.timing)
        self.report.checks[f'the backbone of {kw_config}'] = checks
        self.report.detectors += rows

    def rates(self, setting: Setting) -> Rates:
        """What the machine does in a second in a precision, measured once."""
        name = f'{"GPU " if setting.on_cuda else ""}{str(setting.dtype).removeprefix("torch.")}'
        if name not in self.report.rates:
            self.tell(f'rates of the machine, {name}')
            self.report.rates[name] = measure_rates(setting, **self.rating)
        return self.report.rates[name]
