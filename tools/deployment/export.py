"""Exports a trained detector or segmentor, or its backbone, to a file for another runtime.

    python tools/deployment/export.py CONFIG CHECKPOINT --to onnx --out model.onnx

One file takes any batch size, and any image size that the model does. What it wants to be fed with
is in its metadata; tools/deployment/runner.py needs no more. Then the file is run and compared with
the model.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import cv2
from mmengine.config import Config

import kw_mm  # noqa: F401  (registers everything, for configs without custom_imports too)
from kw_mm.deploy import compare, export_model, load_model
from kw_mm.engine.launch import config_path
from kw_mm.export import ModelFile
from kw_mm.export.files import SUFFIXES, check_path
from kw_mm.export.forms import WEIGHTS


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', type=config_path, help='path of the config')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='path or URL of the checkpoint')
    parser.add_argument('--to', required=True, choices=list(SUFFIXES), help='the format')
    parser.add_argument('--out', required=True, metavar='FILE', help='where to write; ends in '
                        + ', '.join(f'{end} for {name}' for name, end in SUFFIXES.items()))
    parser.add_argument('--part', choices=['whole', 'backbone'], default='whole',
                        help='what to export (default: %(default)s)')
    parser.add_argument('--weights', choices=WEIGHTS, default='bases', help='what the file holds: '
                        'bases are fast, cells are small (default: %(default)s)')
    parser.add_argument('--memory-budget', type=int, metavar='BYTES',
                        help='that bases may take; default: 1.5 GiB')
    parser.add_argument('--multiple', type=int, default=32, help='what heights and widths are a '
                        'multiple of (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, metavar='N', help='write a faster file, that '
                        'takes N images at a time alone; default: any number')
    verify = parser.add_mutually_exclusive_group()
    verify.add_argument('--verify', nargs='+', metavar='IMAGE', default=(),
                        help='images to compare with the model on; default: noise')
    verify.add_argument('--no-verify', action='store_true', help='do not compare')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_path(args.out, args.to)
        images = [read(path) for path in args.verify]
        cfg = Config.fromfile(args.config)
        model = load_model(cfg, args.checkpoint)
        form = export_model(model, cfg, args.out, args.to, weights=args.weights,
                            memory_budget=args.memory_budget, part=args.part,
                            multiple=args.multiple, batch_size=args.batch_size)
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    print('written to', args.out)
    if args.no_verify:
        return
    comparisons = compare(ModelFile(args.out), form, model, cfg, images)
    print('\n'.join(map(str, comparisons)))
    if not all(comparison.equal for comparison in comparisons):
        sys.exit('the file does not compute what the model does')


def read(path: str):
    image = cv2.imread(path)
    if image is None:
        raise ValueError(f'not an image that can be read: {path}')
    return image


if __name__ == '__main__':
    main()
