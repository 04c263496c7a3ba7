"""Draws what a trained detector or segmentor finds in images."""
from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config, DictAction

import kw_mm  # noqa: F401  (registers everything, for configs without custom_imports too)
from kw_mm.engine import launch
from kw_mm.engine.inference import Predictor, find_images


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=launch.config_path, help='path of the config')
    parser.add_argument('checkpoint', help='path or URL of the checkpoint')
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='an image, or a folder of them')
    parser.add_argument('--out-dir', default='outputs',
                        help='where to write: pictures to vis, label maps of segmentors to pred '
                        '(default: %(default)s)')
    parser.add_argument('--device', help='such as cpu or cuda:0; default: a GPU if there is one')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='least score of objects to draw (default: %(default)s)')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE',
                        help='settings that replace those of the config')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    try:
        images = find_images(args.images)
        launch.check_checkpoint(args.checkpoint)
        pictures = Predictor(cfg, args.checkpoint, args.device)(
            images, args.out_dir, args.score_thr)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    print(f'{len(pictures)} pictures in {Path(args.out_dir, "vis")}')


if __name__ == '__main__':
    main()
