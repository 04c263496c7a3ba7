"""Times KW networks beside their static twins, on CPU or GPU.

    python tools/analysis_tools/benchmark.py --suite paper --json bench.json --markdown bench.md
    python tools/analysis_tools/benchmark.py --depth 18 --inference 1x224x224 --training 2x480x640
    python tools/analysis_tools/benchmark.py --layers 1x800x1344 --budgets 4
    python tools/analysis_tools/benchmark.py --whole KW_CONFIG STATIC_CONFIG --shape 1x800x1344

First the network is compared with the method's literal reference, before and after
optimize_for_inference_, outputs and gradients; if they differ, what differs is printed, no speed
is, and the exit status is 1. Then the networks run in turns in one process; the ratio to static,
the floor (bytes and operations over the machine's measured rates) and memory are printed as
Markdown. Shapes are BATCHxHEIGHTxWIDTH. Without CUDA, the GPU's rows of the suite are named and
left open.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from mmengine.config import DictAction
from mmengine.logging import MMLogger

from kw_mm.engine.benchmark.backbones import Subject
from kw_mm.engine.benchmark.machine import describe
from kw_mm.engine.benchmark.networks import BACKBONES
from kw_mm.engine.benchmark.parity import SHAPE, ParityError
from kw_mm.engine.benchmark.report import Report
from kw_mm.engine.benchmark.session import Session
from kw_mm.engine.benchmark.setting import Setting
from kw_mm.engine.benchmark.suite import (
    KINDS,
    PAPER_CPU,
    Goals,
    Workload,
    paper_gpu,
    parse_shape,
)
from kw_mm.engine.launch import config_path

DTYPES = ('float32', 'bfloat16', 'float16')


def shape(text: str) -> tuple[int, int, int]:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    how.add_argument('--dtype', choices=DTYPES, default='float32')
    how.add_argument('--amp', action='store_true',
                     help='weights in single precision, products in --dtype')
    how.add_argument('--channels-last', action='store_true')
    how.add_argument('--compile', action='store_true', help='with torch.compile')
    how.add_argument('--cuda-graphs', action='store_true', help='capture inference')
    how.add_argument('--rounds', type=int, default=7, help='turns; default: 7')
    how.add_argument('--warmups', type=int, default=2, help='runs before; default: 2')
    how.add_argument('--min-seconds', type=float, default=0.2,
                     help='of one program in a turn; default: 0.2')
    how.add_argument('--parity-shape', type=shape, default=SHAPE,
                     help='images of the parity check; default: 2x64x64')
    how.add_argument('--rate-bytes', type=int, default=2**29,
                     help='memory that is read to measure bandwidth; default: 512 MiB')
    how.add_argument('--rate-size', type=int,
                     help='rows of the matrices that measure arithmetic; default: 2048, GPU 8192')
    how.add_argument('--seed', type=int, default=0)

    parser.add_argument('--json', type=Path, metavar='FILE', help='write everything')
    parser.add_argument('--markdown', type=Path, metavar='FILE', help='write what is printed')
    return parser


def settle(args: argparse.Namespace, parser: argparse.ArgumentParser) -> Setting:
    """The setting, after a look at what the options say together."""
    args.options = dict(args.options)
    if args.backbone == 'KWResNet':
        args.options.setdefault('depth', args.depth or 50)
    elif args.depth:
        parser.error(f'--depth is for KWResNet, got --backbone {args.backbone}')
    if args.rounds < 1:
        parser.error(f'--rounds must be at least 1, got {args.rounds}')
    if args.parity_shape[0] < 2:
        parser.error('--parity-shape must have a batch of at least 2')
    if not (args.suite or args.layers or args.whole or any(getattr(args, k) for k in KINDS)):
        parser.error('nothing to measure: give --suite, --inference, --training, --memory, '
                     '--layers or --whole')
    if args.whole and args.dtype != 'float32' and not args.amp:
        parser.error('--whole trains in the precision of its config; add --amp for inference')
    try:
        return Setting(args.device, getattr(torch, args.dtype), args.amp, args.channels_last,
                       args.compile, args.cuda_graphs)
    except ValueError as error:
        parser.error(str(error))


def workloads(args: argparse.Namespace, setting: Setting) -> dict[Workload, Goals]:
    """What the backbones have to do, with goals."""
    found = {Workload(kind, *size, setting): {} for kind in KINDS for size in getattr(args, kind)}
    if args.suite:
        gpu = args.device if setting.on_cuda else 'cuda'
        dtype = torch.bfloat16 if args.dtype == 'float32' else setting.dtype
        found.update({} if setting.on_cuda else PAPER_CPU)
        found.update(paper_gpu(gpu, dtype, args.compile, args.cuda_graphs))
    if args.backbone != 'KWResNet' or args.options['depth'] != 50:
        found = dict.fromkeys(found, {})  # goals are KW-R50's
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    setting = settle(args, parser)
    goals = workloads(args, setting)
    subjects = [Subject(args.backbone, budget, args.options, dict(args.kw_cfg))
                for budget in args.budgets]
    title = ', '.join((args.backbone, *(f'{key}={value}' for key, value in args.options.items()))
                      ) if goals or args.layers else 'Detectors'
    # Of the optimizers of detectors mmengine logs every parameter.
    MMLogger.get_current_instance().setLevel('WARNING')
    session = Session(
        Report(describe(), f'{title}: KernelWarehouse over static'),
        args.memory_budget, args.parity_shape,
        dict(num_rounds=args.rounds, num_warmups=args.warmups, min_seconds=args.min_seconds),
        dict(num_bytes=args.rate_bytes, size=args.rate_size), args.seed,
        tell=lambda text: print(f'... {text}', file=sys.stderr, flush=True))
    try:
        session.check(subjects, [*(workload.setting for workload in goals),
                                 *([setting] if args.layers else [])])
        session.measure(subjects, goals)
        if args.layers:
            session.measure_layers(subjects, Workload('inference', *args.layers, setting))
        if args.whole:
            session.measure_detectors(*args.whole, args.shape, setting)
    except ParityError as error:
        print(f'parity fails, so there are no figures:\n{error}')
        return 1
    text = session.report.markdown()
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding='utf-8')
    if args.json:
        args.json.write_text(session.report.json(), encoding='utf-8')
    return 0


if __name__ == '__main__':
    sys.exit(main())
