"""The main job in small: trains and tests a KW Mask R-CNN on the generated shapes data set.

What an earlier call finished is used again: the data set, the trained detector, or the last epoch
of a training that was interrupted.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner, find_latest_checkpoint

from kw_mm.compat import has_accelerator
from kw_mm.datasets import write_shapes
from kw_mm.engine.checkpoint import check_checkpoint
from kw_mm.table import format_table

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / 'configs' / 'demo' / 'mask-rcnn_kw1x-r18_fpn_shapes.py'
# On CPUs so many tensors are small that two processes of one thread each train faster than one
# of two.
MAX_PROCESSES = 2
NUM_PICTURES = 12
ZOOM = 4  # labels are unreadable at the size of the images
TIME_FILE = 'training_seconds.json'
# One thread per process, and glibc keeps freed memory: mapping and unmapping the kernels of each
# iteration anew takes a fifth of its time on a CPU.
ENVIRONMENT = {'OMP_NUM_THREADS': '1', 'MALLOC_MMAP_MAX_': '0',
               'MALLOC_TRIM_THRESHOLD_': str(2**33), 'MALLOC_TOP_PAD_': str(2**27)}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--config', default=str(CONFIG), help='config to train')
    parser.add_argument('--data', default='data/shapes', help='folder of the data set')
    parser.add_argument('--num-train', type=int, default=1200, help='training images')
    parser.add_argument('--num-val', type=int, default=200, help='validation images')
    parser.add_argument('--work-dir', default='work_dirs/demo', help='where to write the rest')
    parser.add_argument('--epochs', type=int, help="epochs to train, instead of the config's")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    print('== 1/4 data set', flush=True)
    files = write_shapes(args.data, args.num_train, args.num_val, progress=True)
    print(f'{args.num_train} + {args.num_val} images in {files.root}'
          f'{"" if files.written else " (were there)"}')

    trained = find_trained(args)
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


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments change in the config, by dotted names."""
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    changes = {f'{loader}.dataset.data_root': args.data for loader in loaders}
    for evaluator in ('val_evaluator', 'test_evaluator'):
        changes[f'{evaluator}.ann_file'] = f'{args.data}/annotations/instances_val.json'
    if args.epochs:
        changes['train_cfg.max_epochs'] = args.epochs
    return changes


def find_trained(args: argparse.Namespace) -> str | None:
    """The checkpoint of a finished training, if there is one."""
    latest = find_latest_checkpoint(args.work_dir)
    if latest is None:
        return None
    check_checkpoint(latest, resume=True)
    done = torch.load(latest, map_location='cpu', mmap=True)['meta']['epoch']
    wanted = args.epochs or Config.fromfile(args.config).train_cfg.max_epochs
    return latest if done >= wanted else None


def train(args: argparse.Namespace) -> str:
    """Trains to the end, from wherever an earlier call got to, and notes the time it took."""
    record = Path(args.work_dir, TIME_FILE)
    resumed = find_latest_checkpoint(args.work_dir) and record.exists()
    before = json.loads(record.read_text()) if resumed else 0
    num_processes = 1 if has_accelerator() else min(MAX_PROCESSES, os.cpu_count() or 1)
    batch_size = Config.fromfile(args.config).train_dataloader.batch_size // num_processes
    changes = {**options(args), 'train_dataloader.batch_size': batch_size}
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone',
         f'--nproc_per_node={num_processes}', ROOT / 'tools' / 'train.py', args.config,
         '--launcher', 'pytorch', '--work-dir', args.work_dir, '--resume',
         '--cfg-options', *(f'{name}={value}' for name, value in changes.items())],
        check=True, env={**ENVIRONMENT, **os.environ})
    record.write_text(json.dumps(before + time.perf_counter() - start))
    return find_latest_checkpoint(args.work_dir)


def draw(runner: Runner, folder: Path) -> Path:
    """Draws the first images of the test set: ground truth on the left, predictions right."""
    dataset = runner.test_dataloader.dataset
    runner.visualizer.dataset_meta = dataset.metainfo
    runner.model.eval()
    for index in range(min(NUM_PICTURES, len(dataset))):
        with torch.no_grad():
            sample = runner.model.test_step(pseudo_collate([dataset[index]]))[0].cpu()
        image = cv2.cvtColor(cv2.imread(sample.img_path), cv2.COLOR_BGR2RGB)
        height, width = (side * ZOOM for side in image.shape[:2])
        truth, found = sample.gt_instances, sample.pred_instances
        truth.bboxes = truth.bboxes * ZOOM
        truth.masks = truth.masks.resize((height, width))
        found.bboxes = found.bboxes * ZOOM
        found.masks = found.masks.repeat_interleave(ZOOM, 1).repeat_interleave(ZOOM, 2)
        runner.visualizer.add_datasample(
            'shapes', cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), sample,
            pred_score_thr=0.5, out_file=str(folder / f'{Path(sample.img_path).stem}.png'))
    return folder


def closing_table(runner: Runner, metrics: dict[str, float]) -> str:
    """What came out, in a few lines."""
    record = Path(runner.work_dir, TIME_FILE)
    seconds = json.loads(record.read_text()) if record.exists() else float('nan')
    plan = runner.model.backbone.plan
    return '\n' + format_table(('KW Mask R-CNN on shapes', ''), [
        ('box AP (0.50:0.95)', f'{metrics["coco/bbox_mAP"]:.3f}'),
        ('mask AP (0.50:0.95)', f'{metrics["coco/segm_mAP"]:.3f}'),
        ('parameters', f'{sum(p.numel() for p in runner.model.parameters()):,}'),
        ('  in warehouse cells', f'{plan.num_cell_parameters:,}'),
        ('  in their attention', f'{plan.num_attention_parameters:,}'),
        ('training time', f'{seconds / 60:.1f} min')], right=(1,))


if __name__ == '__main__':
    main()
