"""Prints parameters and FLOPs of configs, and how many of them belong to KernelWarehouse.

FLOPs are multiply-adds, each counted as one as in mmengine, of the convolutions and matrix products
that predict for one image, without post-processing. A two-stage detector gets as many proposals and
masks as its test_cfg allows. No data set and no weights are needed.

    python tools/analysis_tools/model_complexity.py CONFIG [CONFIG ...] [--shape 800 1344]

Columns: "cells" and "attention" under params are parameters of kernel cells and of attentions;
"attention" and "assembly" under FLOPs are what it costs an image to attend and to mix its kernels.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import kw_mm  # noqa: F401  (registers everything, for configs without custom_imports too)
from kw_mm.engine.complexity import Complexity, input_size, measure_config
from kw_mm.engine.launch import add_cfg_options, config_path, read_config
from kw_mm.table import format_table

HEADER = ('model', 'params (M)', 'cells', 'attention', 'FLOPs (G)', 'attention', 'assembly')


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', metavar='CONFIG', type=config_path, nargs='+',
                        help='paths of configs')
    parser.add_argument('--shape', metavar=('H', 'W'), type=int, nargs=2,
                        help="height and width of the image; default: as the config's test "
                        'pipeline resizes a landscape image, padded to multiples of 32')
    add_cfg_options(parser, 'the configs')
    return parser


def format_row(name: str, measured: Complexity) -> tuple[str, ...]:
    return (name,
            *(f'{number / 1e6:.2f}' for number in (
                measured.parameters, measured.cell_parameters, measured.attention_parameters)),
            *(f'{number / 1e9:.3f}' for number in (
                measured.flops, measured.attention_flops, measured.assembly_flops)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.shape and min(args.shape) < 1:
        parser.error(f'--shape must be positive, got {args.shape}')
    rows = []
    for path in args.configs:
        cfg = read_config(path, args.cfg_options)
        try:
            size = args.shape or input_size(cfg)
        except ValueError as error:
            parser.error(f'{path}: {error} (--shape)')
        measured = measure_config(cfg, size)
        rows += [format_row(f'{Path(path).stem}, {size[0]} x {size[1]}', measured['']),
                 format_row('  backbone', measured['backbone'])]
    print(format_table(HEADER, rows, right=range(1, len(HEADER))))


if __name__ == '__main__':
    main()
