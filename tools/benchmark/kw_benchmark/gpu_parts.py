"""The parts of ``python tools/benchmark gpu``; each runs in a process of its own.

A part writes what it finds as it goes, most telling first, and raises in the end if anything of it
failed.
"""
from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.logging import MMLogger

from . import detector_training, profiling
from .backbones import compare
from .detectors import compare_detectors
from .gpu_cases import find_cases, run_case, triton
from .machine import Rates, measure_rates
from .networks import Subject, make_images
from .parity import ParityError
from .path_cases import find_path_cases, run_path_case
from .programs import KW, OPTIMISED, STATIC
from .report import describe_checks
from .schedule import Findings
from .setting import Setting, Workload
from .timing import Ratio

CONFIGS = Path(__file__).parents[3] / 'configs'
# Times static that a GPU is to need at most, by kind and budget; of small images in large batches
# other ones.
GOALS = {'inference': {1: 1.15, 4: 1.25}, 'training': {1: 1.2, 4: 1.3},
         'memory': {1: 1.1, 4: 1.35}}
SMALL_GOALS = {1: 1.3, 4: 1.6}
TIMING: dict[str, Any] = dict(num_rounds=5, num_warmups=2, min_seconds=0.2)
QUICK: dict[str, Any] = dict(num_rounds=1, num_warmups=1, min_seconds=0)


class SomeFailed(RuntimeError):
    """Part of a part failed; the rest is there."""


@contextlib.contextmanager
def each(findings: Findings) -> Iterator[Any]:
    """Yields a function that runs something and notes its failure, which then ends nothing else.

    Raises:
        SomeFailed: In the end, if something failed.
    """
    failures: list[str] = []

    def attempt(name: str, function: Any, *args: Any) -> Any:
        torch.manual_seed(0)
        gc.collect()  # networks, whose modules refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        try:
            return function(*args)
        except Exception as error:
            text = f'{type(error).__name__}: {error}'
            # All of a comparison, else what a reader can take in.
            text = text if isinstance(error, ParityError) else text[:600]
            findings.note(f'FAILED {name}: {text}')
            failures.append(name)
            return None

    yield attempt
    if failures:
        raise SomeFailed(', '.join(failures))


def parity(device: str, _: Path) -> None:
    """Every case, then what a GPU must not do: wait for results, or refuse to be captured."""
    findings = Findings()
    with each(findings) as attempt:
        for path, cases in find_path_cases(device).items():
            right = [attempt(str(case), run_path_case, case) is not None for case in cases]
            findings.add('ways to convolve', path=path, settings=len(cases), right=sum(right))
        for case in find_cases(device):
            checks = attempt(str(case), run_case, case)
            findings.add('comparisons', case=case, result='FAILED' if checks is None else
                         describe_checks('it', checks).partition(': ')[2])
        if torch.device(device).type == 'cuda':
            for with_triton in (False, True):
                attempt('launches', profiling.compare_launches, device, findings, with_triton)
            attempt('synchronisation', profiling.check_synchronisation, device, findings)


def backbone(device: str, _: Path) -> None:
    """Figures of KW backbones beside static ones."""
    findings, rates = Findings(), dict[torch.dtype, Rates]()
    torch.backends.cudnn.benchmark = True
    with each(findings) as attempt:
        for workload, with_triton in find_workloads(device):
            setting = workload.setting
            if setting.dtype not in rates:
                rates[setting.dtype] = measure_rates(setting, *(
                    () if setting.on_cuda else (256, 2**20)))
                found = rates[setting.dtype]
                findings.note(
                    f'{setting.dtype_name}: {found.operations / 1e12:.3g} T multiply-adds and '
                    f'{found.bandwidth / 1e9:.4g} GB in a second.')
            for budget in (1, 4):
                options = dict(depth=50) if setting.on_cuda else dict(depth=18, base_channels=8)
                with triton(with_triton):
                    row = attempt(f'{workload.name}, b={budget}', lambda w, b, o, r: compare(
                        Subject('KWResNet', b, o), w, r, **(
                            TIMING if w.setting.on_cuda else QUICK)),
                        workload, budget, options, rates[setting.dtype])
                if row is not None:
                    _add_row(findings, workload, budget, with_triton, row)


def find_workloads(device: str) -> list[tuple[Workload, bool]]:
    """What is measured, and whether with Triton; the most telling first."""
    if torch.device(device).type != 'cuda':
        return [(Workload(kind, 2, 64, 64, Setting(device)), False)
                for kind in ('inference', 'training', 'memory')]
    infer = Setting(device, torch.bfloat16, channels_last=True)
    train = Setting(device, torch.bfloat16, amp=True, channels_last=True)
    captured = Setting(device, torch.bfloat16, channels_last=True, cuda_graphs=True)
    large = (800, 1344)
    first = (Workload('inference', 1, *large, infer), Workload('training', 2, *large, train),
             Workload('inference', 1, *large, captured))
    small = (128, 224, 224)
    others = (Workload('inference', *small, infer), Workload('training', *small, train),
              Workload('memory', 2, *large, train),
              *(Workload(kind, batch, *large, setting) for batch in (2, 4, 8, 16)
                for kind, setting in (('inference', infer), ('training', train))
                if (kind, batch) != ('training', 2)))
    return [*((workload, with_triton) for workload in first for with_triton in (False, True)),
            *((workload, False) for workload in others)]


def _add_row(findings: Findings, workload: Workload, budget: float, with_triton: bool,
             row: dict[str, Any]) -> None:
    ratios, goal = row['ratios'], GOALS[workload.kind][int(budget)]
    if workload.batch == 128:
        goal = SMALL_GOALS[int(budget)]
    shown = {f'{name} / {STATIC}': str(Ratio(**ratios[f'{name} / {STATIC}']))
             for name in (KW, OPTIMISED) if f'{name} / {STATIC}' in ratios}
    if workload.kind == 'memory':
        shown = {f'{name} MB': f'{found["total"] / 1e6:.0f}'
                 for name, found in row['memory'].items()} | {
            f'{KW} / {STATIC}': f'{ratios[f"{KW} / {STATIC}"]["median"]:.3f}'}
    else:
        shown = {f'{name} ms': f'{times["total"] * 1e3:.4g}'
                 for name, times in row['seconds'].items()} | shown | {
            'floor': f'{min(row["floors"].values()):.3g}'}
    findings.add(workload.kind, workload=workload.name, b=budget, triton=with_triton, **shown,
                 goal=goal)


def detector(device: str, out: Path) -> None:
    """Training of whole detectors, from configs of the project."""
    findings = Findings()
    with each(findings) as attempt:
        detector_training.run(device, out / 'detector', CONFIGS / 'mask_rcnn', findings, attempt)


def optimised(device: str, _: Path) -> None:
    """A whole detector before and after ``optimize_for_inference_``, beside its static twin."""
    findings, on_cuda = Findings(), torch.device(device).type == 'cuda'
    MMLogger.get_current_instance().setLevel('WARNING')  # or every parameter is logged
    folder = CONFIGS / ('mask_rcnn' if on_cuda else 'demo')
    names = ('mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco', 'mask-rcnn_r50_fpn_ms-adamw-1x_coco')
    if not on_cuda:
        names = ('mask-rcnn_kw1x-r18_fpn_shapes', 'mask-rcnn_r18_fpn_shapes')
    setting = Setting(device, torch.bfloat16, amp=True) if on_cuda else Setting(device)
    checks, rows = compare_detectors(
        *(str(folder / f'{name}.py') for name in names), (1, 800, 1344) if on_cuda else (1, 64, 64),
        setting, **(dict(TIMING, num_rounds=3) if on_cuda else QUICK))
    findings.note(describe_checks('the backbone', checks))
    for row in rows:
        findings.add(f'{row["kind"]}, {names[0]}', **{
            f'{name} ms': f'{times["total"] * 1e3:.4g}' for name, times in row['seconds'].items()},
            **{name: str(Ratio(**ratio)) for name, ratio in row['ratios'].items()})


def profile(device: str, _: Path) -> None:
    """Where the time of an inference and of a training step goes."""
    findings, on_cuda = Findings(), torch.device(device).type == 'cuda'
    shape = (2, 800, 1344) if on_cuda else (2, 64, 64)
    options = dict(depth=50) if on_cuda else dict(depth=18, base_channels=8)
    setting = Setting(device, torch.bfloat16 if on_cuda else torch.float32, amp=on_cuda,
                      channels_last=True)
    with each(findings) as attempt:
        for budget in (4, 1) if on_cuda else (1,):
            subject = Subject('KWResNet', budget, options)
            for kind in ('training', 'inference', 'optimised'):
                attempt(f'{kind}, b={budget}', profiling.profile, subject, kind,
                        make_images(*shape), setting, findings)
