"""Converts the authors' released checkpoints for MMDetection 3.x, and back with --reverse.

    python tools/model_converters/official2kw.py SRC DST

SRC is an ImageNet checkpoint or a detector of MMDetection 2.x. The backbone of DST is loaded with
init_cfg=dict(type='Pretrained', checkpoint='DST', prefix='backbone.'); a detector as a whole with
tools/test.py CONFIG DST.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from kw_mm import convert_official_checkpoint, to_official_checkpoint
from kw_mm.checkpoint import check_destination, read_checkpoint, write_checkpoint


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='path of the checkpoint to convert')
    parser.add_argument('dst', metavar='DST', help='path of the checkpoint to write; folders are '
                        'made if missing')
    parser.add_argument('--weights', metavar='NAME', help='which weights to take where SRC holds '
                        'several: model_ema (the moving average, taken by default), model or '
                        'state_dict')
    parser.add_argument('--reverse', action='store_true', help='convert SRC, converted before or '
                        "trained here, to the authors' layout")
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.reverse and args.weights:
        parser.error('--weights chooses in a file of the authors, it does not go with --reverse')
    try:
        check_destination(args.dst, args.force)
    except FileExistsError as error:
        parser.error(f'{error}; --force replaces it')
    except OSError as error:
        parser.error(str(error))
    try:
        # Training scripts keep their options in the file. A namespace is but attributes.
        checkpoint = read_checkpoint(args.src, allowed=[argparse.Namespace])
        if args.reverse:
            converted, report = to_official_checkpoint(checkpoint)
        else:
            converted, report = convert_official_checkpoint(checkpoint, args.weights)
        write_checkpoint(converted, args.dst, args.force)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(report)
    print(f'{"written":<10}{args.dst}')


if __name__ == '__main__':
    main()
