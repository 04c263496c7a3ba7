"""Exports models of configs and compares each file with PyTorch, in every runtime that reads it.

    python tools/deployment/check.py configs/dino/*r50_8xb2-12e*.py --to onnx torchscript

For whoever changes a model or a version. No checkpoint is needed: weights are random, but as after
training. Files of torch are run in processes of their own.
"""
from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

import kw_mm  # noqa: F401  (registers everything, for configs without custom_imports too)
from kw_mm.deploy import compare, export_model, load_model
from kw_mm.engine.inference import find_images
from kw_mm.engine.launch import add_cfg_options, config_path, image_size, read_config
from kw_mm.export import ModelFile
from kw_mm.export.files import RUNTIMES, SUFFIXES, need
from kw_mm.export.forms import WEIGHTS
from kw_mm.models.random_weights import random_model
from kw_mm.table import format_table

# Large enough for the 900 queries of a DINO.
CASES = [(1, (256, 256)), (2, (256, 384)), (5, (320, 224))]
# A program that needs kw_mm only for the two operators of detectors.
PROGRAM = """
import sys
import numpy, torch
path, inputs, outputs, is_detector = sys.argv[1:]
if is_detector == 'True':
    import kw_mm.deploy
inputs = [torch.from_numpy(x) for x in numpy.load(inputs).values()]
model = torch.jit.load(path) if path.endswith('.torchscript') else torch.export.load(path).module()
with torch.no_grad():
    found = model(*inputs)
assert is_detector == 'True' or 'kw_mm' not in sys.modules
numpy.savez(outputs, *(y.numpy() for y in found))
"""


class FreshProcess:
    """A file of torch, run each time in a new process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metadata = ModelFile(path).metadata

    def __call__(self, *inputs: np.ndarray) -> list[np.ndarray]:
        """The model's outputs."""
        with tempfile.TemporaryDirectory() as folder:
            feeds, found = Path(folder, 'in.npz'), Path(folder, 'out.npz')
            np.savez(feeds, *inputs)
            subprocess.run([sys.executable, '-W', 'ignore', '-c', PROGRAM, self.path, feeds, found,
                            str(self.metadata['kind'] == 'detector')], check=True)
            return list(np.load(found).values())


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('configs', metavar='CONFIG', nargs='+', type=config_path,
                        help='paths of configs')
    parser.add_argument('--checkpoint', help='of the model; default: random weights')
    parser.add_argument('--part', choices=['whole', 'backbone'], default='whole',
                        help='what to export (default: %(default)s)')
    parser.add_argument('--to', nargs='+', choices=list(SUFFIXES), default=['onnx'],
                        help='the formats (default: onnx)')
    parser.add_argument('--weights', choices=WEIGHTS, default='bases',
                        help='what files hold (default: %(default)s)')
    parser.add_argument('--multiple', type=int, default=32,
                        help='of heights and widths (default: %(default)s)')
    parser.add_argument('--batch-size', type=int, metavar='N', help='write files for N images '
                        'alone; default: any number')
    parser.add_argument('--cases', nargs='+', type=case, metavar='NxHxW', default=CASES,
                        help='numbers and sizes of images to compare at (default: 1x256x256 '
                        '2x256x384 5x320x224)')
    parser.add_argument('--images', nargs='+', metavar='IMAGE', default=(),
                        help='images, or folders of them, to compare on; default: noise')
    parser.add_argument('--out-dir', metavar='DIR', help='keep the files there')
    add_cfg_options(parser, 'the configs')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    args.pictures = [cv2.imread(path) for path in find_images(args.images)]
    rows, good = [], True
    for config, to in itertools.product(args.configs, args.to):
        for row, comparisons in check(config, to, args):
            rows.append(row)
            good &= all(comparison.equal for comparison in comparisons)
            print(*row, *comparisons, sep='\n  ', flush=True)
    print(format_table(('config', 'runtime', 'MB', 'cases', 'worst error'), rows, right=(2, 3, 4)))
    if not good:
        sys.exit('not every file computes what its model does')


def case(text: str) -> tuple[int, tuple[int, int]]:
    """For argparse: a number of images, their height and width, written as ``2x256x384``."""
    number, _, size = text.partition('x')
    if not (number.isdecimal() and int(number)):
        raise argparse.ArgumentTypeError(f'must be NxHEIGHTxWIDTH, as 2x256x384, got {text!r}')
    return int(number), image_size(size)


def check(config: str, to: str, args: argparse.Namespace) -> Any:
    """A row of the table, and the comparisons in it, for each runtime that reads the file."""
    cfg = read_config(config, args.cfg_options)
    model = load_model(cfg, args.checkpoint) if args.checkpoint else random_model(cfg)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out_dir or temporary
        path = Path(folder, f'{Path(config).stem}{SUFFIXES[to]}')
        form = export_model(model, cfg, path, to, weights=args.weights, part=args.part,
                            multiple=args.multiple, batch_size=args.batch_size)
        size = sum(file.stat().st_size for file in path.parent.glob(f'{path.stem}.*'))
        if to == 'onnx':
            # By its path, because what exceeds 2 GB lies beside the file.
            need('onnx').checker.check_model(str(path), full_check=True)
        for runtime in RUNTIMES[path.suffix]:
            run: Any = (FreshProcess(path) if runtime == 'torch' else
                        ModelFile(path, runtime=runtime))
            comparisons = compare(run, form, model, cfg, args.pictures, args.cases)
            worst = max(comparison.error for comparison in comparisons)
            yield ((Path(config).stem, runtime, f'{size / 1e6:.0f}', str(len(comparisons)),
                    f'{worst:.1e}'), comparisons)


if __name__ == '__main__':
    main()
