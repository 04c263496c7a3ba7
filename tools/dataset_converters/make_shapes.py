"""Generates the shapes data set, see ``kw_mm.datasets.write_shapes``.

    python tools/dataset_converters/make_shapes.py data/shapes
"""
from __future__ import annotations

import argparse
import sys

from kw_mm.datasets import describe_shapes, write_shapes


def parse_args() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        description='Generate a data set of simple shapes: COCO instances and label maps.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('root', metavar='ROOT', help='folder of the data set, made if missing')
    parser.add_argument('--num-train', type=int, default=1200, help='number of training images')
    parser.add_argument('--num-val', type=int, default=200, help='number of validation images')
    parser.add_argument('--size', type=parse_size, default='128', metavar='SIDE|WxH',
                        help='size of the images in pixels, e.g. 128 or 160x120')
    parser.add_argument('--seed', type=int, default=0, help='seed of the data set')
    parser.add_argument('--overwrite', '--force', action='store_true',
                        help='replace a shapes data set of other parameters in ROOT')
    return parser, parser.parse_args()


def parse_size(text: str) -> int | tuple[int, int]:
    sides = text.lower().split('x')
    if not 1 <= len(sides) <= 2 or not all(side.isdecimal() for side in sides):
        raise argparse.ArgumentTypeError(f'expected SIDE or WIDTHxHEIGHT, got {text!r}')
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def main() -> None:
    parser, args = parse_args()
    try:
        files = write_shapes(
            args.root,
            num_train=args.num_train,
            num_val=args.num_val,
            size=args.size,
            seed=args.seed,
            progress=sys.stderr.isatty(),
            overwrite=args.overwrite)
    except ValueError as error:
        parser.error(str(error))
    print(describe_shapes(files))
    print('written to' if files.written else 'already complete, left as it is:', files.root)


if __name__ == '__main__':
    main()
