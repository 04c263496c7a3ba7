"""Fine-tunes a static detector and its KW counterpart from the same static weights.

Trains a static Mask R-CNN on the generated shapes data set, makes it dynamic with
tools/model_converters/static2kw.py, and tests both, which must give the same figures. Then both are
fine-tuned in the same way, once for each seed. Results of an earlier call are used again.
"""
from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import Config
from mmengine.runner import Runner

from kw_mm.datasets import write_shapes
from kw_mm.engine.local_training import find_trained, train_locally, use_shapes
from kw_mm.files import read_json, write_json
from kw_mm.table import format_table

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / 'configs' / 'demo'
METRICS = {'box AP': 'coco/bbox_mAP', 'mask AP': 'coco/segm_mAP'}
TOLERANCE = 0.001


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--budgets', type=int, nargs='+', default=[1], choices=[1, 4],
                        help='cells per mixture of the dynamic detectors')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--data', default='data/shapes', help='folder of the data set')
    parser.add_argument('--num-train', type=int, default=1200, help='training images')
    parser.add_argument('--num-val', type=int, default=200, help='validation images')
    parser.add_argument('--work-dir', default='work_dirs/static_start')
    parser.add_argument('--epochs', type=int, help='epochs of the first training')
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    write_shapes(args.data, args.num_train, args.num_val, progress=True)
    folder = Path(args.work_dir)
    static = train(args, 'mask-rcnn_r18_fpn_shapes', folder / 'static', epochs=args.epochs)
    starts = {'r18': static}
    for budget in args.budgets:
        starts[f'kw{budget}x-r18'] = convert(f'kw{budget}x-r18', static, folder)
    results = {}
    for name, start in starts.items():
        config = f'mask-rcnn_{name}_fpn_finetune-shapes'
        results[name] = [test(args, config, start, folder / f'{name}_start')]
        for seed in args.seeds:
            tuned = train(args, config, folder / f'{name}_seed{seed}', seed, start)
            results[name].append(test(args, config, tuned, folder / f'{name}_seed{seed}'))
    write_json(folder / 'results.json', dict(seeds=args.seeds, **results), indent=1)
    print(table(results))
    for name, (start, *_) in results.items():
        lost = max(abs(start[m] - results['r18'][0][m]) for m in METRICS)
        if lost > TOLERANCE:
            sys.exit(f'error: {name} starts {lost:.4f} AP from the static detector, which is more '
                     f'than {TOLERANCE}')


def train(args: argparse.Namespace, config: str, work_dir: Path, seed: int = 0,
          start: str | None = None, epochs: int | None = None) -> str:
    """Trains, unless an earlier call has; returns the checkpoint."""
    path = str(CONFIGS / f'{config}.py')
    changes = {**use_shapes(args.data, path), 'randomness.seed': seed}
    if start:
        # Weights are loaded by the model, because a resumed run would take load_from for a
        # checkpoint to resume.
        changes['model.init_cfg.type'] = 'Pretrained'
        changes['model.init_cfg.checkpoint'] = start
    if epochs:
        changes['train_cfg.max_epochs'] = epochs
    trained = find_trained(str(work_dir), epochs or Config.fromfile(path).train_cfg.max_epochs)
    return trained or train_locally(ROOT / 'tools' / 'train.py', path, str(work_dir), changes)


def convert(name: str, static: str, folder: Path) -> str:
    """Makes the static detector dynamic."""
    target = folder / f'{name}.pth'
    if not target.exists():
        subprocess.run([sys.executable, ROOT / 'tools' / 'model_converters' / 'static2kw.py',
                        CONFIGS / f'mask-rcnn_{name}_fpn_finetune-shapes.py', static, target],
                       check=True)
    return str(target)


def test(args: argparse.Namespace, config: str, checkpoint: str, work_dir: Path) -> dict:
    """Box and mask AP of a checkpoint."""
    record = work_dir / 'test.json'
    known = read_json(record)
    if known is not None:
        return known
    path = str(CONFIGS / f'{config}.py')
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(use_shapes(args.data, path))
    cfg.work_dir = str(work_dir)
    cfg.load_from = checkpoint
    metrics = Runner.from_cfg(cfg).test()
    found = {name: metrics[key] for name, key in METRICS.items()}
    write_json(record, found)
    return found


def table(results: dict[str, list[dict]]) -> str:
    """Figures before and after fine-tuning; the latter as mean and range over the seeds."""
    rows = []
    for name, (start, *tuned) in results.items():
        row = [name]
        for metric in METRICS:
            values = [result[metric] for result in tuned]
            spread = f'{statistics.mean(values):.3f} ({min(values):.3f}..{max(values):.3f})'
            row += [f'{start[metric]:.3f}', spread]
        rows.append(row)
    header = ['backbone', *(f'{metric}, {when}' for metric in METRICS
                            for when in ('start', 'fine-tuned'))]
    return format_table(header, rows, right=(1, 2, 3, 4))


if __name__ == '__main__':
    main()
