"""Tells what is left of a static start in a trained KW model, and what its attentions are worth.

    python tools/analysis_tools/inspect_mixing.py CONFIG CHECKPOINT IMAGES...

By layer: the part of the mixing weights that is still with the cells that mixtures are tied to, and
how far the kernels of single images are from their mean. For the model: its metrics on the config's
test data with the kernels of each image, and with each kernel fixed at its mean over IMAGES.
"""
from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmengine.config import Config

from kw_mm.checkpoint import write_checkpoint
from kw_mm.deploy import load_model
from kw_mm.deploy.static_network import make_static
from kw_mm.engine import launch
from kw_mm.engine.inference import find_images
from kw_mm.export import StaticReport
from kw_mm.files import replace_text, write_json
from kw_mm.table import format_table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', type=launch.config_path,
                        help='path of the config of the KW model')
    parser.add_argument('checkpoint', metavar='CHECKPOINT', help='path of its checkpoint')
    parser.add_argument('images', nargs='+', metavar='IMAGES',
                        help='images, or folders of them, such as those of the training')
    parser.add_argument('--max-images', type=int, default=100,
                        help='use the first ones of them (default: %(default)s)')
    parser.add_argument('--no-test', action='store_true', help='only the figures by layer')
    parser.add_argument('--json', metavar='FILE', help='write all figures to this file as well')
    launch.add_cfg_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    cfg = launch.read_config(args.config, args.cfg_options)
    try:
        images = find_images(args.images)[:args.max_images]
        model = load_model(Config(cfg.to_dict()), args.checkpoint)
        static = make_static(model, cfg, images)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    figures = dict(summary=summarise(static.report), num_images=len(images),
                   layers=[asdict(layer) for layer in static.report.layers])
    print(static.report)
    print(', '.join(f'{name} {value:.3f}' for name, value in figures['summary'].items()))
    if not args.no_test:
        with tempfile.TemporaryDirectory() as folder:
            config, checkpoint = (str(Path(folder, name)) for name in ('fixed.py', 'fixed.pth'))
            write_checkpoint(static.checkpoint, checkpoint)
            replace_text(config, static.cfg.pretty_text)
            dynamic = launch.test_checkpoint(args.config, args.checkpoint, folder,
                                             args.cfg_options)
            fixed = launch.test_checkpoint(config, checkpoint, folder, args.cfg_options)
        figures.update(metrics=dynamic, fixed_metrics=fixed)
        print(format_table(('metric', 'as trained', 'kernels fixed', 'cost of fixing'), [
            (name, f'{dynamic[name]:.4f}', f'{fixed[name]:.4f}',
             f'{dynamic[name] - fixed[name]:+.4f}') for name in dynamic if name in fixed],
            right=(1, 2, 3)))
    if args.json:
        write_json(args.json, figures, indent=1)


def summarise(report: StaticReport) -> dict[str, float]:
    """Median and extremes over the layers that images reach."""
    seen = [layer for layer in report.layers if layer.num_kernels]
    parts = [layer.start_part for layer in seen if not math.isnan(layer.start_part)]
    spreads = [layer.spread for layer in seen]
    found = {}
    if parts:
        found.update({"start's part, median": statistics.median(parts),
                      "start's part, least": min(parts)})
    if spreads:
        found.update({'spread, median': statistics.median(spreads), 'spread, most': max(spreads)})
    return found


if __name__ == '__main__':
    main()
