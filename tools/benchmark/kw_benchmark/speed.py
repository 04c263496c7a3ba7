"""Times KW networks and their static twins, on CPU or GPU.

    python tools/benchmark speed --suite paper --json bench.json --markdown bench.md
    python tools/benchmark speed --depth 18 --inference 1x224x224 --training 2x480x640
    python tools/benchmark speed --layers 1x800x1344 --budgets 4
    python tools/benchmark speed --whole KW_CONFIG STATIC_CONFIG --shape 1x800x1344

First the results are compared with the method, in the same setting: outputs before and after
optimize_for_inference_, and gradients if training is timed. If anything differs, that is printed
instead of figures, and the exit status is 1. Then the networks run in turns in one process. Printed
as Markdown are the ratio to static, the floor (bytes and operations divided by the machine's
measured rates) and memory. Shapes are BATCHxHEIGHTxWIDTH. Without CUDA, the suite's rows for GPUs
are listed without figures.
"""
from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger

from kw_mm.engine.launch import config_path

from .backbones import compare
from .detectors import compare_detectors
from .layers import compare_layers
from .machine import Rates, describe, measure_rates
from .memory import CAN_MEASURE_CPU
from .networks import BACKBONES, SHAPE, Subject
from .parity import ParityError, check_network
from .report import NO_GPU, NO_MEMORY, Report
from .setting import KINDS, Setting, Workload, paper_suite, parse_shape


def shape(text: str) -> tuple[int, int, int]:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python tools/benchmark speed', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group('what is measured')
    what.add_argument('--suite', choices=['paper'], help='the standard set of workloads')
    for kind in KINDS:
        what.add_argument(f'--{kind}', metavar='SHAPE', type=shape, nargs='+', default=[],
                          help=f'{kind} of the backbone with such images')
    what.add_argument('--layers', metavar='SHAPE', type=shape,
                      help='every distinct dynamic layer, in a backbone with such images')
    what.add_argument('--whole', metavar=('KW_CONFIG', 'STATIC_CONFIG'), type=config_path,
                      nargs=2, help='whole detectors, inference and a training step')
    what.add_argument('--shape', type=shape, default=(1, 800, 1344),
                      help='images of --whole; default: 1x800x1344')

    network = parser.add_argument_group('the network')
    network.add_argument('--backbone', choices=list(BACKBONES), default='KWResNet')
    network.add_argument('--depth', type=int, help='of a KWResNet; default: 50')
    network.add_argument('--options', nargs='+', action=DictAction, default={},
                         metavar='KEY=VALUE', help='further options of the backbone')
    network.add_argument('--budgets', type=float, nargs='+', default=[1, 4], metavar='B')
    network.add_argument('--kw-cfg', nargs='+', action=DictAction, default={},
                         metavar='KEY=VALUE', help='further settings of the warehouses')
    network.add_argument('--memory-budget', type=int, metavar='BYTES',
                         help='of optimize_for_inference_; default: its own')

    how = parser.add_argument_group('how')
    how.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    how.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'],
                     help='default: float32, of the suite on a GPU bfloat16')
    how.add_argument('--amp', action='store_true',
                     help='weights in single precision, products in --dtype')
    how.add_argument('--channels-last', action='store_true')
    how.add_argument('--compile', action='store_true',
                     help='with torch.compile, whole or not at all; not for memory on a CPU')
    how.add_argument('--cuda-graphs', action='store_true', help='capture inference')
    how.add_argument('--rounds', type=int, default=7, help='turns; default: 7')
    how.add_argument('--warmups', type=int, default=2, help='runs before; default: 2')
    how.add_argument('--min-seconds', type=float, default=0.2,
                     help='of one program in a turn; default: 0.2')
    how.add_argument('--parity-shape', type=shape, default=SHAPE,
                     help='images of the parity check; default: 2x64x64')
    how.add_argument('--seed', type=int, default=0)

    parser.add_argument('--json', type=Path, metavar='FILE', help='write everything')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write what is printed')
    return parser


def settle(args: argparse.Namespace, parser: argparse.ArgumentParser
           ) -> tuple[Setting, list[Workload]]:
    """The setting and the workloads, after checking that the options fit together."""
    args.options = dict(args.options)
    if args.backbone == 'KWResNet':
        args.options.setdefault('depth', args.depth or 50)
    elif args.depth:
        parser.error(f'--depth is for KWResNet, got --backbone {args.backbone}')
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    if args.parity_shape[0] < 2:
        parser.error('--parity-shape must have a batch of at least 2')
    if args.whole and args.dtype not in (None, 'float32') and not args.amp:
        parser.error('--whole trains in the precision of its config; add --amp for inference')
    if args.whole and (args.compile or args.cuda_graphs or args.channels_last):
        parser.error('--whole runs detectors as their configs have them; it does not go with '
                     '--compile, --cuda-graphs or --channels-last')
    try:
        setting = Setting(args.device, getattr(torch, args.dtype or 'float32'), args.amp,
                          args.channels_last, args.compile, args.cuda_graphs)
        found = [Workload(kind, *size, setting) for kind in KINDS for size in getattr(args, kind)]
        if args.suite and not setting.on_cuda:
            found += paper_suite(setting)
        if args.suite:
            dtype = getattr(torch, args.dtype or 'bfloat16')
            device = args.device if setting.on_cuda else 'cuda'
            found += paper_suite(replace(setting, device=device, dtype=dtype))
    except ValueError as error:
        parser.error(str(error))
    if not (found or args.layers or args.whole):
        parser.error('nothing to measure: give --suite, --inference, --training, --memory, '
                     '--layers or --whole')
    return setting, found


def measure(args: argparse.Namespace, setting: Setting, workloads: Sequence[Workload],
            report: Report) -> None:
    """Compares everything with the method, then measures it and fills the report.

    Raises:
        ParityError: If something differs.
    """
    timing = dict(num_rounds=args.rounds, num_warmups=args.warmups, min_seconds=args.min_seconds)
    subjects = [Subject(args.backbone, budget, args.options, dict(args.kw_cfg))
                for budget in args.budgets]

    def start(text: str) -> None:
        print(f'... {text}', file=sys.stderr, flush=True)
        torch.manual_seed(args.seed)
        gc.collect()  # earlier networks, whose modules refer to each other

    def rates(setting: Setting) -> Rates:
        name = f'{"GPU " if setting.on_cuda else ""}{setting.dtype_name}'
        if name not in report.rates:
            report.rates[name] = measure_rates(setting)
        return report.rates[name]

    layers = [Workload('inference', *args.layers, setting)] if args.layers else []
    trained = {w.setting for w in workloads if w.kind != 'inference'} | {w.setting for w in layers}
    for subject in subjects:
        for way in dict.fromkeys(w.setting for w in (*workloads, *layers) if w.setting.at_hand):
            name = f'{subject.label}, {way.label}'
            start(f'parity of {name}')
            report.checks[name] = check_network(subject.build(), way, args.memory_budget,
                                                args.parity_shape, way in trained)
    for workload in workloads:
        for subject in subjects:
            start(f'{workload.name}, {subject.label}')
            row: dict[str, Any] = dict(workload=workload.name, kind=workload.kind,
                                       budget=subject.budget, missing=_missing(workload))
            if not row['missing']:
                row = compare(subject, workload, rates(workload.setting), args.memory_budget,
                              **timing)
            report.rows.append(dict(row, backbone=subject.name))
    for subject in subjects if layers else ():
        start(f'layers of {subject.label}')
        report.layers += compare_layers(subject, layers[0], rates(setting), args.memory_budget,
                                        **timing)
    if args.whole:
        start(' and '.join(args.whole))
        report.checks[f'the backbone of {args.whole[0]}'], report.detectors = compare_detectors(
            *args.whole, args.shape, setting, args.memory_budget, args.parity_shape, **timing)


def _missing(workload: Workload) -> str | None:
    """Why a workload cannot be measured here, or None."""
    if not workload.setting.at_hand:
        return NO_GPU
    if workload.kind == 'memory' and not (workload.setting.on_cuda or CAN_MEASURE_CPU):
        return NO_MEMORY
    return None


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    setting, workloads = settle(args, parser)
    title = ', '.join((args.backbone, *(f'{key}={value}' for key, value in args.options.items()))
                      ) if workloads or args.layers else 'Detectors'
    # mmengine logs every parameter when it builds the optimizer of a detector.
    MMLogger.get_current_instance().setLevel('WARNING')
    report = Report(describe(), f'{title}: KernelWarehouse over static')
    try:
        measure(args, setting, workloads, report)
    except ParityError as error:
        print(f'parity fails, so there are no figures:\n{error}')
        return 1
    except RuntimeError as error:
        if not (args.compile and isinstance(error, torch._dynamo.exc.TorchDynamoException)):
            raise
        print('torch.compile does not take the networks as a whole, so there are no figures; '
              f'without --compile there may be: {error}')
        return 1
    text = report.markdown()
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding='utf-8')
    if args.json:
        args.json.write_text(report.json(), encoding='utf-8')
    return 0
