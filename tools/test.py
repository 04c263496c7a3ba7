"""Tests a detector or segmentor: metrics, and on request predictions and pictures."""
from __future__ import annotations

import argparse
from collections.abc import Sequence

import kw_mm  # noqa: F401  (registers everything, for configs without custom_imports too)
from kw_mm.engine import launch
from kw_mm.engine.hooks import BoxesAloneHook, OptimizeForTestHook


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', type=launch.config_path, help='path of the config')
    parser.add_argument('checkpoint', help='path or URL of the checkpoint')
    parser.add_argument('--out', help='keep the predictions: in a .pkl file for detectors, in a '
                        'folder for segmentors')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for pictures of the predictions; for detectors '
                        "within the run's folder in the work directory")
    parser.add_argument('--wait-time', type=float, default=2, metavar='SECONDS',
                        help='how long --show keeps a picture (default: %(default)s)')
    parser.add_argument('--tta', action='store_true',
                        help='augment images in testing and merge the predictions; of masks of '
                        'instances, which cannot be merged, their boxes')
    parser.add_argument('--optimize', action='store_true',
                        help='make the model faster first, with kw_mm.optimize_for_inference_')
    launch.add_common_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    cfg = launch.load_config(args)
    cfg.load_from = args.checkpoint
    cfg.resume = False
    try:
        launch.check_checkpoint(args.checkpoint)
        if args.show or args.show_dir:
            launch.enable_drawing_(cfg, args.show, args.show_dir, args.wait_time)
        if args.out:
            launch.set_output_(cfg, args.out)
        if args.tta:
            launch.enable_tta_(cfg)
        launch.check_data_sets(args, cfg, ('test_dataloader', ))
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    runner = launch.build_runner(cfg)
    if args.tta:
        runner.register_hook(BoxesAloneHook())
    if args.optimize:
        runner.register_hook(OptimizeForTestHook())
    try:
        with launch.strict_loading():
            runner.test()
    except launch.CheckpointMismatch as error:
        parser.error(str(error))


if __name__ == '__main__':
    main()
