"""Does it pay? Trains configs that differ in their backbone alike, and compares them.

    python tools/analysis_tools/compare.py STATIC_CONFIG KW_CONFIG... --seeds 0 1 2 --out DIR

Each config is trained and tested once for each seed. One seed gives all of them the same batches,
augmentations and initial heads. DIR/report.md has each seed, paired differences to the first
config with an interval, curves, time and memory, and all that differs between the recipes. Called
again, it goes on where it was interrupted. With your own data in COCO's format:

    ... --train-data ANNOTATIONS.json IMAGES/ --val-data ANNOTATIONS.json IMAGES/

Without further options each config starts as it says. With --start CHECKPOINT all start from this
static model; what is dynamic is converted with static2kw.py.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch
from mmengine.config import Config
from torch import nn

import kw_mm
from kw_mm.checkpoint import write_checkpoint
from kw_mm.compat import has_accelerator
from kw_mm.engine.comparison import (
    LocalTrainer,
    lock_folder,
    prepare_arms,
    run_all,
    use_own_data_,
    widen,
    write_report,
)
from kw_mm.engine.comparison.arms import build_model, count_parameters
from kw_mm.engine.launch import add_cfg_options, config_path, read_config
from kw_mm.layers import WarehouseManager

ROOT = Path(__file__).resolve().parents[2]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', nargs='+', type=config_path, metavar='CONFIG',
                        help='the first is what the others are compared with')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--out', required=True, type=Path, help='folder to write to')
    own = dict(nargs=2, metavar=('ANNOTATIONS', 'IMAGES'))
    parser.add_argument('--train-data', **own, help='your training data: annotation file in '
                        "COCO's format, folder")
    parser.add_argument('--val-data', **own, help='your test data, likewise')
    parser.add_argument('--start', metavar='CHECKPOINT',
                        help='trained static model from which all arms start')
    parser.add_argument('--equal-parameters', action='store_true',
                        help='add a wider static network for each dynamic one, of as many '
                        'parameters; for training from scratch')
    parser.add_argument('--jobs', type=int, help='runs at a time; default: 1 with a GPU, else 2')
    add_cfg_options(parser, 'every config')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if len(args.configs) < 2 and not args.equal_parameters:
        parser.error('there must be at least two configs')
    if bool(args.train_data) != bool(args.val_data):
        parser.error('--train-data and --val-data must be given together')
    if args.start and args.equal_parameters:
        parser.error('--equal-parameters is for training from scratch, without --start')
    names = [Path(config).stem for config in args.configs]
    if len(set(names)) < len(names) or len(set(args.seeds)) < len(args.seeds):
        parser.error('configs must have different file names, and seeds be different')
    try:
        configs = {name: load(path, args) for name, path in zip(names, args.configs)}
        if args.equal_parameters:
            add_wider_(configs)
        args.out.mkdir(parents=True, exist_ok=True)
        arms = prepare_arms(configs, args.out)
        starts = {name: start_of(args, path, name) for name, path in zip(names, args.configs)
                  } if args.start else {}
    except (OSError, ValueError) as error:
        parser.error(str(error))
    cores = os.cpu_count() or 1
    # Small tensors keep two threads of one process less busy than two processes of one.
    jobs = args.jobs or (1 if has_accelerator() else min(2, cores))

    def say(line: str) -> None:
        print(line, flush=True)

    with lock_folder(args.out, say) as lock:
        trainer = LocalTrainer(ROOT / 'tools', max(1, cores // jobs), lock)
        runs, failures = run_all(arms, args.seeds, args.out, trainer, starts, jobs, say)
    if runs:
        print(write_report(args.out, arms, runs, failures, about(args)))
    print(f'written to {args.out}')
    if failures:
        sys.exit(f'error: {len(failures)} of {len(args.seeds) * len(arms)} trainings failed')


def load(path: str, args: argparse.Namespace) -> Config:
    """A config with the options applied."""
    cfg = read_config(path, args.cfg_options)
    if args.train_data:
        use_own_data_(cfg, args.train_data, args.val_data)
    return cfg


def is_dynamic(model: nn.Module) -> bool:
    return any(isinstance(module, WarehouseManager) and module.plan.layers
               for module in model.modules())


def add_wider_(configs: dict[str, Config]) -> None:
    """Adds a static arm of the size of each dynamic one, made from the first config."""
    static, *_ = configs.values()
    for name, cfg in list(configs.items()):
        model = build_model(cfg)
        if is_dynamic(model):
            configs[f'static-as-large-as-{name}'] = widen(static, count_parameters(model))


def start_of(args: argparse.Namespace, config: str, name: str) -> str:
    """The checkpoint that an arm starts from: that of the static model, or converted."""
    cfg = load(config, args)
    if not is_dynamic(build_model(cfg)):
        return args.start
    target = args.out / f'start_{name}.pth'
    if not target.exists():
        checkpoint, report = kw_mm.static_checkpoint_to_kw(cfg, args.start)
        write_checkpoint(checkpoint, str(target))
        print(report)
    return str(target)


def about(args: argparse.Namespace) -> dict[str, str]:
    """When, where and with what the comparison was run."""
    commit = ''
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(['git', '-C', ROOT, 'describe', '--always', '--dirty'],
                                capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else (
        f'{platform.processor() or platform.machine()}, {os.cpu_count()} CPUs')
    return dict(command=' '.join(['python', 'tools/analysis_tools/compare.py', *sys.argv[1:]]),
                date=datetime.now(timezone.utc).strftime('%Y-%m-%d'), machine=device,
                seeds=', '.join(map(str, args.seeds)), torch=torch.__version__,
                kw_mm=kw_mm.__version__, commit=commit or 'unknown')


if __name__ == '__main__':
    main()
