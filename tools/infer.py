"""Writes the predictions of a trained detector or segmentor as pictures and as data.

OUT_DIR/vis has the pictures, named as the images. A detector's predictions of any score are in
OUT_DIR/predictions.json, in COCO's format. A segmentor's are in OUT_DIR/pred: one PNG for each
image, whose pixels are the numbers of their classes, from 0.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mmengine.utils import track_iter_progress

import kw_mm  # noqa: F401  (registers everything, for configs without custom_imports too)
from kw_mm.engine import launch
from kw_mm.engine.inference import Predictor, find_images


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', type=launch.config_path, help='path of the config')
    parser.add_argument('checkpoint', help='path or URL of the checkpoint')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='an image, or a folder of them')
    parser.add_argument('--out-dir', default='outputs',
                        help='where to write (default: %(default)s)')
    parser.add_argument('--device', help='such as cpu or cuda:0; default: a GPU if there is one')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='least score of objects to draw (default: %(default)s)')
    parser.add_argument('--zoom', type=int, metavar='N',
                        help='enlarge pictures N times; default: small ones, so that labels can '
                        'be read')
    parser.add_argument('--optimize', action='store_true',
                        help='make the model faster first, with kw_mm.optimize_for_inference_')
    launch.add_cfg_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    cfg = launch.read_config(args.config, args.cfg_options)
    if args.zoom is not None and args.zoom < 1:
        parser.error(f'--zoom must be at least 1, got {args.zoom}')
    try:
        images = find_images(args.images)
        launch.check_checkpoint(args.checkpoint)
        written = Predictor(cfg, args.checkpoint, args.device, args.optimize)(
            images, args.out_dir, args.score_thr, args.zoom,
            partial(track_iter_progress, file=sys.stderr) if sys.stderr.isatty() else iter)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f'{len(written.pictures)} pictures in {Path(args.out_dir, "vis")}, predictions in '
          f'{written.predictions}')
    if written.unreadable:
        for path in written.unreadable:
            print(f'not an image that can be read: {path}', file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main()
