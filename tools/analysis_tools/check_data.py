"""Checks the data sets of a config: files, classes, boxes or label maps, and every image.

    python tools/analysis_tools/check_data.py CONFIG

No model is built. The exit status is 1 if it finds a fault that would end a training.
tools/train.py does the same at its start with a sample of the images.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from mmengine.utils import ProgressBar

import kw_mm  # noqa: F401  (registers everything, for configs without custom_imports too)
from kw_mm.datasets import check_data
from kw_mm.engine.launch import add_cfg_options, config_path, read_config

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', type=config_path, help='path of the config')
    parser.add_argument('--loaders', nargs='+', choices=LOADERS, default=list(LOADERS[:2]),
                        help='whose data sets to check (default: those of training and '
                        'validation)')
    parser.add_argument('--sample', type=int, metavar='N',
                        help='read N images of each data set; default: all')
    add_cfg_options(parser)
    return parser


class ImageProgress:
    """A bar on the terminal for each data set, if there is a terminal."""

    def __init__(self) -> None:
        self.bar = None

    def __call__(self, num: int | None) -> None:
        if num:
            self.bar = ProgressBar(num, file=sys.stderr)
        elif num is None:
            self.bar.update()
            if self.bar.completed == self.bar.task_num:
                print(file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.sample is not None and args.sample < 1:
        parser.error(f'--sample must be at least 1, got {args.sample}')
    cfg = read_config(args.config, args.cfg_options)
    found = check_data(cfg, args.loaders, args.sample,
                       progress=ImageProgress() if sys.stderr.isatty() else None)
    for line in found.lines():
        print(line)
    for sentence in found.errors:
        print(f'error: {sentence}')
    if found.errors:
        sys.exit(1)
    print('nothing was found that would end a training')


if __name__ == '__main__':
    main()
