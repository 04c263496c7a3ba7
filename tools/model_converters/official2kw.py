"""Converts the authors' released checkpoints for MMDetection 3.x, and back with --reverse.

    python tools/model_converters/official2kw.py SRC DST
    python tools/model_converters/official2kw.py SRC DST --config CONFIG

The first is for the models that the authors have released; of another one CONFIG names the
backbone. SRC is an ImageNet checkpoint or a detector of MMDetection 2.x. The backbone of DST is
loaded with init_cfg=dict(type='Pretrained', checkpoint='DST', prefix='backbone.'); a detector as
a whole with tools/test.py CONFIG DST.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from mmengine.config import Config

from kw_mm import convert_official_checkpoint, to_official_checkpoint
from kw_mm.checkpoint import check_destination, read_checkpoint, write_checkpoint
from kw_mm.engine.launch import config_path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='path of the checkpoint to convert')
    parser.add_argument('dst', metavar='DST', help='path of the checkpoint to write; folders are '
                        'made if missing')
    parser.add_argument('--weights', metavar='NAME', help='which weights to take where SRC holds '
                        'several: model_ema (the moving average, taken by default), model or '
                        'state_dict')
    parser.add_argument('--config', metavar='CONFIG', type=config_path, help='a config whose '
                        'model.backbone is that of SRC, if it is none of the released models')
    parser.add_argument('--reverse', action='store_true', help='convert SRC, converted before or '
                        "trained here, to the authors' layout")
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    return parser


def read_backbone(path: str) -> dict[str, Any]:
    """The backbone of a config, as a plain dict."""
    backbone = (Config.fromfile(path).get('model') or {}).get('backbone')
    if backbone is None:
        raise ValueError(f'config {path!r} must have model.backbone')
    return backbone.to_dict()


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
        backbone = read_backbone(args.config) if args.config else None
        # Training scripts keep their options in the file. A namespace is but attributes.
        checkpoint = read_checkpoint(args.src, allowed=[argparse.Namespace])
        if args.reverse:
            converted, report = to_official_checkpoint(checkpoint, backbone)
        else:
            converted, report = convert_official_checkpoint(checkpoint, args.weights,
                                                            backbone)
        write_checkpoint(converted, args.dst, args.force)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(report)
    print(f'{"written":<10}{args.dst}')


if __name__ == '__main__':
    main()
