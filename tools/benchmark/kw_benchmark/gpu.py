"""Checks and measures everything on a GPU, in the order of its worth, within a few minutes.

    python tools/benchmark gpu --minutes 10 --out work_dirs/gpu_check
    python tools/benchmark gpu --device cpu     # the same steps in small, where there is no GPU

It takes the interpreter and the PYTHONPATH that it is started with, installs and builds nothing
and needs no network. Every part runs in a process of its own; one that fails or hangs costs only
itself. results.json and results.md are written as it goes.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from .machine import describe
from .schedule import Part, run_parts

TOOL = Path(__file__).parents[1]
# Kept of the time for writing the results.
RESERVE_SECONDS = 5

# Name, title and share of the time, in the order of their worth.
PARTS = {
    'parity': ('every path equals the method: outputs, gradients, launches, synchronisation', 2.5),
    'backbone': ('KW-R50 over static R50: inference, training, memory', 3.5),
    'detector': ('Mask R-CNN KW-R50 and its static twin: training, resume, torchrun', 2.5),
    'optimised': ('optimize_for_inference_ on the detector', 1.0),
    'profile': ('where the time of a step and of an inference goes, by kernel', 1.0),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python tools/benchmark gpu', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--minutes', type=float, default=10, help='in all; default: 10')
    parser.add_argument('--device', default='cuda', help='default: cuda; cpu for a try in small')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/gpu_check'), metavar='FOLDER',
                        help='default: work_dirs/gpu_check')
    parser.add_argument('--only', choices=list(PARTS), nargs='+', metavar='PART',
                        help=f'of {", ".join(PARTS)}; default: all')
    # How a part is started.
    parser.add_argument('--run', choices=list(PARTS), help=argparse.SUPPRESS)
    return parser


def find_facts(device: str) -> dict[str, Any]:
    """What a reader must know: card, driver, versions, and whether mmcv's operators are there."""
    facts: dict[str, Any] = dict(device=device, **describe())
    if torch.device(device).type == 'cuda':
        facts['capability'] = '.'.join(map(str, torch.cuda.get_device_capability(device)))
        facts['driver'] = _driver()
    facts['mmcv_operators'] = 'there' if find_spec('mmcv._ext') else 'missing: no detector can run'
    return facts


def _driver() -> str:
    try:
        return subprocess.run(['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader'],
                              capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f'unknown: {error}'


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        kind = torch.device(args.device).type
    except RuntimeError as error:
        parser.error(f'--device must be one of torch, as cuda or cpu, got {args.device!r}: {error}')
    if args.minutes <= 0:
        parser.error(f'--minutes must be positive, got {args.minutes:g}')
    if kind == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda needs a CUDA device, and torch finds none; --device cpu goes '
                     'through the same steps in small')
    out = args.out.resolve()
    if args.run:
        from . import gpu_parts
        getattr(gpu_parts, args.run)(args.device, out)
        return 0
    command = [sys.executable, str(TOOL), 'gpu', '--device', args.device, '--out', str(out)]
    parts = [Part(name, title, [*command, '--run', name], share)
             for name, (title, share) in PARTS.items() if name in (args.only or PARTS)]
    facts = find_facts(args.device)
    print('\n'.join(f'{name}: {value}' for name, value in facts.items()), flush=True)
    is_well = run_parts(parts, out, args.minutes * 60 - RESERVE_SECONDS, facts)
    print((out / 'results.md').read_text(encoding='utf-8'))
    return 0 if is_well else 1
