"""Compares a KW backbone with its static twin."""
from __future__ import annotations

from typing import Any

from .machine import Rates, assembly_seconds, layer_costs, optimizer_seconds
from .memory import measure_memory
from .networks import Subject, folded, make_images, optimised
from .programs import FOLDED, KW, OPTIMISED, STATIC, inference, summarise, training
from .setting import Workload
from .timing import time_in_turns


def compare(subject: Subject, workload: Workload, rates: Rates,
            memory_budget: int | None = None, **timing: Any) -> dict[str, Any]:
    """Measures both with a workload.

    Args:
        subject: The backbone.
        workload: What to run.
        rates: The machine's rates, for the floor.
        memory_budget: That of the optimised copy.
        **timing: Options of ``time_in_turns``.

    Returns:
        A row of the report as plain data: ``seconds`` of each phase and program, ``ratios`` to
        static, and ``floors`` as ratios to static; or ``memory`` in bytes.
    """
    setting, is_training = workload.setting, workload.kind == 'training'
    row = dict(workload=workload.name, kind=workload.kind, shape=list(workload.shape),
               budget=subject.budget, setting=setting.describe())
    if workload.kind == 'memory':
        memory = {name: measure_memory(subject, workload, name == STATIC) for name in (STATIC, KW)}
        ratio = memory[KW] / memory[STATIC]
        return dict(row, memory={name: dict(total=found) for name, found in memory.items()},
                    ratios={f'{KW} / {STATIC}': dict(median=ratio, low=ratio, high=ratio)})
    setting.forget_compiled()
    static, kw = (setting.place(subject.build_trained(is_static)) for is_static in (True, False))
    x = setting.place(make_images(*workload.shape))
    if is_training:
        programs = {STATIC: training(static, x, setting), KW: training(kw, x, setting)}
    else:
        fast, report = optimised(kw, memory_budget)
        row['optimised_bytes'] = report.num_bytes
        modules = {STATIC: static, FOLDED: folded(static), KW: kw, OPTIMISED: fast}
        programs = {name: inference(module, x, setting) for name, module in modules.items()
                    if module is not None}
    times = time_in_turns(programs, setting.device, **timing)
    floors = assembly_seconds((layer_costs(plan, workload.batch, setting.dtype.itemsize)
                               for plan in kw.plan.layers.values()), rates, is_training)
    if is_training:
        new, old = (sum(p.numel() for p in net.parameters()) for net in (kw, static))
        floors['cells'] += optimizer_seconds(new - old, rates)
    return {**row, **summarise(times, floors)}
