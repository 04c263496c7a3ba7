"""Trains and tests a small KW model on the generated shapes data set.

It is a Mask R-CNN, or with ``--config configs/demo/fpn_kw1x-r18_shapes.py`` a Semantic FPN. Results
of an earlier call are used again: the data set, the trained model, or the last epoch of an
interrupted training. For a data set of another size, other folders are used.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner

from kw_mm.datasets import write_shapes
from kw_mm.engine.local_training import find_trained, train_locally, use_shapes
from kw_mm.engine.pictures import enlarge, enlarge_, zoom_of
from kw_mm.files import read_json, write_json
from kw_mm.resuming import find_whole_checkpoint
from kw_mm.table import format_table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'demo' / 'mask-rcnn_kw1x-r18_fpn_shapes.py'
NUM_IMAGES = (1200, 200)  # for training and for validation
NUM_PICTURES = 12
TIME_FILE = 'training_seconds.json'


class Task(NamedTuple):
    """What depends on the toolbox: the final table, and how predictions are drawn.

    Figures map their names in the table to their names in the metrics and their maximum.
    """

    title: str
    figures: dict[str, tuple[str, float]]
    draw_options: dict[str, Any]


TASKS = dict(
    mmdet=Task('KW Mask R-CNN on shapes', {
        'box AP (0.50:0.95)': ('coco/bbox_mAP', 1),
        'mask AP (0.50:0.95)': ('coco/segm_mAP', 1)}, dict(pred_score_thr=0.5)),
    mmseg=Task('KW Semantic FPN on shapes', {
        'mean IoU': ('mIoU', 100),
        'mean accuracy of classes': ('mAcc', 100),
        'accuracy of pixels': ('aAcc', 100)}, {}))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--config', default=str(CONFIG), help='config to train')
    parser.add_argument('--data', help='folder of the data set; default: data/shapes, for another '
                        'number of images data/shapes-TRAIN-VAL')
    parser.add_argument('--num-train', type=int, default=NUM_IMAGES[0], help='training images')
    parser.add_argument('--num-val', type=int, default=NUM_IMAGES[1], help='validation images')
    parser.add_argument('--work-dir', help='where to write the rest; default: work_dirs/demo or '
                        'work_dirs/demo-seg, for another number of images with -TRAIN-VAL')
    parser.add_argument('--overwrite', action='store_true',
                        help='replace a shapes data set of other parameters in the folder')
    parser.add_argument('--epochs', type=int, help="epochs to train, instead of the config's")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    set_folders_(args)
    print('== 1/4 data set', flush=True)
    try:
        files = write_shapes(args.data, args.num_train, args.num_val, progress=True,
                             overwrite=args.overwrite)
    except ValueError as error:
        parser.error(str(error))
    print(f'{args.num_train} + {args.num_val} images in {files.root}'
          f'{"" if files.written else " (were there)"}')

    epochs = args.epochs or Config.fromfile(args.config).train_cfg.max_epochs
    trained = find_trained(args.work_dir, epochs)
    if trained:
        print(f'== 2/4 training: {trained} is trained already', flush=True)
    else:
        print('== 2/4 training; the log has the time left as eta', flush=True)
        trained = train(args)
    cfg = Config.fromfile(args.config)
    cfg.merge_from_dict(options(args))
    cfg.work_dir = args.work_dir
    cfg.load_from = trained
    runner = Runner.from_cfg(cfg)
    print('== 3/4 evaluation', flush=True)
    metrics = runner.test()
    print('== 4/4 pictures', flush=True)
    pictures = draw(runner, Path(args.work_dir) / 'pictures')
    print(closing_table(runner, metrics))
    print(f'\nGround truth (left) and predictions (right): {pictures}')


def set_folders_(args: argparse.Namespace) -> None:
    """Sets the folders that were not given; they depend on the number of images."""
    sizes = (args.num_train, args.num_val)
    suffix = '' if sizes == NUM_IMAGES else '-{}-{}'.format(*sizes)
    name = 'demo' if Config.fromfile(args.config).default_scope == 'mmdet' else 'demo-seg'
    args.data = args.data or f'data/shapes{suffix}'
    args.work_dir = args.work_dir or f'work_dirs/{name}{suffix}'


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The changes that the arguments make to the config, by dotted names."""
    changes = use_shapes(args.data, args.config)
    if args.epochs:
        changes['train_cfg.max_epochs'] = args.epochs
    return changes


def train(args: argparse.Namespace) -> str:
    """Trains to the end, starting where an earlier call stopped, and notes the time it took."""
    record = Path(args.work_dir, TIME_FILE)
    before = read_json(record) if find_whole_checkpoint(args.work_dir).path else None
    start = time.perf_counter()
    trained = train_locally(ROOT / 'tools' / 'train.py', args.config, args.work_dir, options(args))
    write_json(record, (before or 0) + time.perf_counter() - start)
    return trained


def draw(runner: Runner, folder: Path) -> Path:
    """Draws the first images of the test set with ground truth (left) and predictions (right)."""
    dataset = runner.test_dataloader.dataset
    runner.visualizer.dataset_meta = dataset.metainfo
    runner.model.eval()
    for index in range(min(NUM_PICTURES, len(dataset))):
        with torch.no_grad():
            sample = runner.model.test_step(pseudo_collate([dataset[index]]))[0].cpu()
        image = cv2.cvtColor(cv2.imread(sample.img_path), cv2.COLOR_BGR2RGB)
        enlarge_(sample, zoom_of(image))
        runner.visualizer.add_datasample(
            'shapes', enlarge(image, zoom_of(image)), sample,
            out_file=str(folder / f'{Path(sample.img_path).stem}.png'),
            **TASKS[runner.cfg.default_scope].draw_options)
    return folder


def closing_table(runner: Runner, metrics: dict[str, float]) -> str:
    """The results in a few lines."""
    seconds = read_json(Path(runner.work_dir, TIME_FILE)) or float('nan')
    plan = runner.model.backbone.plan
    task = TASKS[runner.cfg.default_scope]
    return '\n' + format_table((task.title, ''), [
        *((name, f'{metrics[key] / whole:.3f}') for name, (key, whole) in task.figures.items()),
        ('parameters', f'{sum(p.numel() for p in runner.model.parameters()):,}'),
        ('  in warehouse cells', f'{plan.num_cell_parameters:,}'),
        ('  in their attention', f'{plan.num_attention_parameters:,}'),
        ('training time', f'{seconds / 60:.1f} min')], right=(1,))


if __name__ == '__main__':
    main()
