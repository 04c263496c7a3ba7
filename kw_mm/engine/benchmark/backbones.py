"""A KW backbone beside its static twin."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from . import floor
from .floor import Assembly, Rates
from .memory import measure_memory
from .networks import build_backbone, folded, make_images, optimised, randomise_
from .parity import SHAPE, Check, check_network
from .programs import BACKWARD, FORWARD, inference, training
from .setting import Setting
from .suite import Workload
from .timing import Phases, Times, time_in_turns

STATIC, FOLDED, KW, OPTIMISED = 'static', 'static, folded', 'KW', 'KW, optimised'


@dataclass(frozen=True)
class Subject:
    """What is compared: a backbone at a budget.

    Attributes:
        name: Of the backbone, one of ``BACKBONES``.
        budget: Cells per mixture.
        options: Of the backbone, for both twins.
        kw_cfg: Further settings of the warehouses.
    """

    name: str
    budget: float
    options: Mapping[str, Any]
    kw_cfg: Mapping[str, Any]

    @property
    def label(self) -> str:
        """Name, options and budget."""
        return ', '.join((self.name, *(f'{key}={value}' for key, value in self.options.items()),
                          f'b={self.budget:g}',
                          *(f'{key}={value}' for key, value in self.kw_cfg.items())))

    @property
    def warehouse_cfg(self) -> dict[str, Any]:
        """All settings of the warehouses."""
        return dict(self.kw_cfg, cell_num_ratio=self.budget)

    def build(self, static: bool = False) -> nn.Module:
        """The network, or its static twin."""
        return build_backbone(self.name, None if static else self.warehouse_cfg, **self.options)


def check(subject: Subject, setting: Setting, memory_budget: int | None = None,
          shape: tuple[int, int, int] = SHAPE) -> list[Check]:
    """Compares the KW network with the reference; see ``check_network``."""
    return check_network(subject.build(), setting, memory_budget, shape)


def compare(subject: Subject, workload: Workload, rates: Rates,
            memory_budget: int | None = None, **timing: Any) -> dict[str, Any]:
    """Measures a workload, side by side.

    Args:
        subject: The backbone.
        workload: What it is to do.
        rates: Of the machine, for the floor.
        memory_budget: For the optimised copy.
        **timing: Options of ``time_in_turns``.

    Returns:
        A row of the report, plain data: ``seconds`` of each phase and program, ``ratios`` to
        static, ``floors`` as ratios to static, or ``memory`` in bytes.
    """
    row = dict(workload=workload.name, kind=workload.kind, shape=list(workload.shape),
               budget=subject.budget, setting=workload.setting.describe())
    if workload.kind == 'memory':
        return {**row, **_compare_memory(subject, workload)}
    static, kw = (workload.setting.place(_trained(subject, is_static))
                  for is_static in (True, False))
    x = workload.setting.place(make_images(*workload.shape))
    floors = assembly_seconds(kw, workload, rates)
    if workload.kind == 'training':
        extra = _num_parameters(kw) - _num_parameters(static)
        floors['cells'] += floor.optimizer(extra, rates)
        programs = {STATIC: training(static, x, workload.setting),
                    KW: training(kw, x, workload.setting)}
    else:
        programs, row['optimised_bytes'] = inference_programs(
            static, kw, x, workload.setting, memory_budget)
    times = time_in_turns(programs, workload.setting.device, **timing)
    base = times[STATIC].median()
    return {**row, **summarise(times),
            'floors': {way: 1 + seconds / base for way, seconds in floors.items()}}


def inference_programs(static: nn.Module, kw: nn.Module, x: Tensor, setting: Setting,
                       memory_budget: int | None) -> tuple[dict[str, Phases], int]:
    """Inference of both as they are and as fast as each can be made, and the bytes that takes."""
    fast, report = optimised(kw, memory_budget)
    modules = {STATIC: static, FOLDED: folded(static), KW: kw, OPTIMISED: fast}
    return {name: inference(module, x, setting) for name, module in modules.items()
            if module is not None}, report.num_bytes


def assembly_seconds(kw: nn.Module, workload: Workload, rates: Rates) -> dict[str, float]:
    """The least that mixing the kernels takes beyond the static network, in seconds."""
    itemsize = workload.setting.compute_dtype.itemsize
    layers = [Assembly.of(plan, workload.batch, itemsize) for plan in kw.plan.layers.values()]
    if workload.kind == 'training':
        return dict(cells=floor.total(layers, rates, floor.training))
    return {name: floor.total(layers, rates, way) for name, way in floor.INFERENCE.items()}


def summarise(times: Mapping[str, Times]) -> dict[str, Any]:
    """Medians of every program and phase, and ratios to static, as plain data."""
    ratios = {f'{name} / {base}': vars(times[name].over(times[base]))
              for base in (STATIC, FOLDED) if base in times
              for name in times if name not in (STATIC, FOLDED)}
    if BACKWARD in times[STATIC].phases:
        ratios[f'{KW} / {STATIC}, forward and backward'] = vars(
            times[KW].over(times[STATIC], FORWARD, BACKWARD))
    return dict(
        seconds={name: dict(total=time.median(),
                            **{phase: time.median(phase) for phase in time.phases},
                            rounds=list(time.rounds()))
                 for name, time in times.items()},
        ratios=ratios)


def _compare_memory(subject: Subject, workload: Workload) -> dict[str, Any]:
    found = {name: measure_memory(subject.name, kw_cfg, subject.options, workload)
             for name, kw_cfg in ((STATIC, None), (KW, subject.warehouse_cfg))}
    ratio = found[KW].total / found[STATIC].total
    return dict(memory={name: vars(memory) for name, memory in found.items()},
                ratios={f'{KW} / {STATIC}': dict(median=ratio, low=ratio, high=ratio)})


def _trained(subject: Subject, is_static: bool) -> nn.Module:
    """A network whose attentions' ReLU is open for about half of the units, as in trained ones."""
    module = subject.build(is_static)
    randomise_(module, make_images(*SHAPE))
    return module


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
