"""Starts a KW detector or segmentor from the checkpoint of its static counterpart.

    python tools/model_converters/static2kw.py CONFIG SRC DST
    python tools/model_converters/static2kw.py CONFIG SRC DST --images FOLDER

CONFIG is that of the KW model, SRC a checkpoint of the same model without KW. DST loads strictly;
set it as load_from to train on, or test it: with a budget of at least 1 it predicts what SRC does.
If SRC has another number of classes, as a detector trained on COCO, the layers that count classes
are left out and named, and DST is for load_from alone.

With a budget below 1, nothing is left of what SRC predicts. --images brings it back in part: cells
are then fitted to the feature maps that the static network has on the images of a folder, without
annotations. With --backbone, SRC is that of the backbone alone, as from ImageNet, and so is DST,
again for load_from.
"""
from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from mmengine.config import Config

from kw_mm import static_checkpoint_to_kw
from kw_mm.checkpoint import check_destination, write_checkpoint
from kw_mm.engine.image_fit import ImageFit
from kw_mm.engine.launch import config_path


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', type=config_path,
                        help='path of the config of the KW model')
    parser.add_argument('src', metavar='SRC', help='path or URL of the static checkpoint')
    parser.add_argument('dst', metavar='DST', help='path of the checkpoint to write; folders are '
                        'made if missing')
    parser.add_argument('--backbone', action='store_true', help='SRC is that of the backbone alone')
    parser.add_argument('--images', metavar='FOLDER',
                        help='with a budget below 1: fit to the static network on these images')
    parser.add_argument('--minutes', type=float, default=10.0,
                        help='how long to fit (default: %(default)s)')
    parser.add_argument('--steps', type=int, help='how many steps to fit instead, which gives the '
                        'same result on every run')
    parser.add_argument('--seed', type=int, default=0, help='of everything random')
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
    torch.manual_seed(args.seed)
    try:
        fit = ImageFit(args.images, args.minutes, args.steps, seed=args.seed) if (
            args.images) else None
        checkpoint, report = static_checkpoint_to_kw(Config.fromfile(args.config), args.src,
                                                     args.backbone, fit)
        write_checkpoint(checkpoint, args.dst, args.force)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(report)
    if fit:
        print(fit.report)
    print('written to', args.dst)


if __name__ == '__main__':
    main()
