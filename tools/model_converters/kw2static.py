"""Fixes the kernels of a trained KW detector or segmentor: an ordinary network remains.

    python tools/model_converters/kw2static.py CONFIG CHECKPOINT OUT_DIR --images FOLDER

Writes OUT_DIR/config.py, of ordinary layers, and OUT_DIR/static.pth, which loads strictly. Each
kernel becomes the mean of those that the images get, without images that of the attention's bias.
Then both models are tested with the config's data set, for the metrics before and after.
"""
from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config

from kw_mm.checkpoint import check_destination, write_checkpoint
from kw_mm.deploy import load_model
from kw_mm.deploy.static_network import make_static
from kw_mm.engine import launch
from kw_mm.engine.inference import find_images
from kw_mm.files import replace_text
from kw_mm.table import format_table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', type=launch.config_path,
                        help='path of the config of the KW model')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='path of its checkpoint')
    parser.add_argument('out_dir', metavar='OUT_DIR', help='folder to write to, made if missing')
    parser.add_argument('--images', nargs='+', metavar='IMAGE', default=(),
                        help='images, or folders of them, such as some hundred training images')
    parser.add_argument('--max-images', type=int, default=200,
                        help='use the first ones of them (default: %(default)s)')
    parser.add_argument('--no-test', action='store_true', help='do not test both models')
    parser.add_argument('--force', action='store_true', help='overwrite what is in OUT_DIR')
    launch.add_cfg_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    cfg = launch.read_config(args.config, args.cfg_options)
    config, checkpoint = (str(Path(args.out_dir, name)) for name in ('config.py', 'static.pth'))
    try:
        for path in (config, checkpoint):
            check_destination(path, args.force)
        images = find_images(args.images)[:args.max_images]
        model = load_model(Config(cfg.to_dict()), args.checkpoint)
        static = make_static(model, cfg, images)
        os.makedirs(args.out_dir, exist_ok=True)
        write_checkpoint(static.checkpoint, checkpoint, args.force)
        replace_text(config, static.cfg.pretty_text)
    except FileExistsError as error:
        parser.error(f'{error}; --force replaces it')
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(static.report)
    print('kernels are means over', f'{len(images)} images' if images else
          "nothing: they are those of the attention's bias, without images")
    print('written to', config, 'and', checkpoint)
    if not args.no_test:
        before, after = (launch.test_checkpoint(
            path, weights, args.out_dir, args.cfg_options) for path, weights in (
            (args.config, args.checkpoint), (config, checkpoint)))
        print(format_table(('metric', 'KW', 'static'), [
            (name, f'{before[name]:.4f}', f'{after[name]:.4f}') for name in before
            if name in after], right=(1, 2)))


if __name__ == '__main__':
    main()
