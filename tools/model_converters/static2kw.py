"""Starts a KW detector or segmentor from the checkpoint of its static counterpart.

    python tools/model_converters/static2kw.py CONFIG SRC DST

CONFIG is that of the KW model, SRC a checkpoint of the same model without KW. DST loads strictly;
set it as load_from to train on, or test it: with a budget of at least 1 it predicts what SRC does.
If SRC has another number of classes, as a detector trained on COCO, the layers that count classes
are left out and named, and DST is for load_from alone.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from mmengine.config import Config

from kw_mm import static_checkpoint_to_kw
from kw_mm.checkpoint import check_destination, write_checkpoint
from kw_mm.engine.launch import config_path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', type=config_path,
                        help='path of the config of the KW model')
    parser.add_argument('src', metavar='SRC', help='path or URL of the static checkpoint')
    parser.add_argument('dst', metavar='DST', help='path of the checkpoint to write; folders are '
                        'made if missing')
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        check_destination(args.dst, args.force)
    except FileExistsError as error:
        parser.error(f'{error}; --force replaces it')
    except OSError as error:
        parser.error(str(error))
    try:
        checkpoint, report = static_checkpoint_to_kw(Config.fromfile(args.config), args.src)
        write_checkpoint(checkpoint, args.dst, args.force)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(report)
    print('written to', args.dst)


if __name__ == '__main__':
    main()
