"""Trains a detector or segmentor from a config."""
from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence

import kw_mm  # noqa: F401  (registers everything, for configs without custom_imports too)
from kw_mm.engine import launch
from kw_mm.models.checkpoint_names import DownloadFailed


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=launch.config_path, help='path of the config')
    parser.add_argument('--amp', action='store_true', help='train in automatic mixed precision')
    parser.add_argument('--auto-scale-lr', action='store_true',
                        help='scale the learning rate with the total batch size')
    parser.add_argument('--resume', nargs='?', const='auto', metavar='PATH',
                        help='go on from a checkpoint; without a path from the newest whole one in '
                        'the work directory, or from the beginning if there is none')
    launch.add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    cfg = launch.load_config(args)
    start = cfg.get('load_from')
    try:
        if args.amp:
            launch.enable_amp_(cfg)
        if args.auto_scale_lr:
            launch.enable_auto_scale_lr_(cfg)
        if args.resume or cfg.get('resume'):
            launch.set_resume_(cfg, args.resume or start or 'auto')
        elif start:
            launch.check_checkpoint(start)
        launch.check_data_sets(args, cfg, ('train_dataloader', 'val_dataloader'))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    runner = launch.build_runner(cfg)
    try:
        resumed = launch.choose_checkpoint_(runner, otherwise=start)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    if resumed:
        launch.prepare_resume_(runner)
    try:
        with launch.strict_loading() if resumed else contextlib.nullcontext():
            runner.train()
    except (launch.CheckpointMismatch, DownloadFailed) as error:
        parser.error(str(error))
    except launch.NotWrittenError as error:
        parser.exit(1, f'{parser.prog}: error: {error}\n')


if __name__ == '__main__':
    main()
