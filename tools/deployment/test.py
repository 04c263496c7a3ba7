"""Tests an exported detector or segmentor with the data set and the metrics of a config.

    python tools/deployment/test.py CONFIG FILE.onnx

The file gets images as they are on the disk (runner.py): what is measured is all that a user of the
file has, and no part of the model in PyTorch.
"""
from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import track_iter_progress
from runner import Runner

import kw_mm  # noqa: F401  (registers everything, for configs without custom_imports too)
from kw_mm.config_types import type_name
from kw_mm.engine.launch import add_cfg_options, config_path, read_config
from kw_mm.export.files import need

KINDS = dict(mmdet='detector', mmseg='segmentor')


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', metavar='CONFIG', type=config_path, help='path of the config')
    parser.add_argument('file', metavar='FILE', help='.onnx or .xml, of a whole model')
    parser.add_argument('--threads', type=int,
                        help="how many to use; default: the runtime's choice")
    add_cfg_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = make_parser()
    args = parser.parse_args(argv)
    cfg = read_config(args.config, args.cfg_options)
    try:
        run = open_file(args.file, args.threads)
        check_model(run, cfg, args.file)
        init_default_scope(cfg.get('default_scope', 'mmengine'))
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        check_classes(run, list(dataset.metainfo['classes']), args.file)
    except (FileNotFoundError, ImportError, ValueError) as error:
        parser.error(str(error))
    evaluator = Evaluator(cfg.test_evaluator)
    evaluator.dataset_meta = dataset.metainfo
    indices: Any = range(len(dataset))
    for index in track_iter_progress(indices, file=sys.stderr) if sys.stderr.isatty() else indices:
        sample = dataset[index]['data_samples']
        found = run(cv2.imread(sample.img_path))
        evaluator.process([add_prediction(sample, found)])
    metrics = evaluator.evaluate(len(dataset))
    for name, value in metrics.items():
        print(f'{name}: {value:.4f}')
    return metrics


def open_file(path: str, threads: int | None) -> Runner:
    if not Path(path).is_file():
        raise FileNotFoundError(f'file {path!r} does not exist')
    if not path.endswith(('.onnx', '.xml')):
        raise ValueError(f'the file must end in .onnx or .xml, got {path!r}')
    need('openvino' if path.endswith('.xml') else 'onnxruntime')
    try:
        return Runner(path, threads)
    except ValueError:
        raise
    except Exception as error:  # each runtime has types of its own
        raise ValueError(f'{path!r} must be a file that can be read: {error}') from error


def check_model(run: Runner, cfg: Config, path: str) -> None:
    """Refuses the file of another kind of model than the config has."""
    kind = KINDS.get(cfg.get('default_scope'))
    if run.info['kind'] != kind:
        raise ValueError(f'{path!r} must be the file of a {kind}, as the config is of, got a '
                         f'{run.info["kind"]}')
    for part, own in (('model', cfg.model), ('backbone', cfg.model.get('backbone'))):
        if run.info[part] != type_name(own):
            raise ValueError(f'{path!r} must be of the {part} that the config has, '
                             f'{type_name(own)}, got one of {run.info[part]}')


def check_classes(run: Runner, classes: list[str], path: str) -> None:
    """Refuses the file of a model with other classes than the data set has."""
    if run.classes != classes:
        raise ValueError(f'{path!r} must be of a model with the classes of the data set, '
                         f'{classes[:5]}, ..., got {run.classes[:5]}, ...')


def add_prediction(sample: Any, found: Any) -> dict[str, Any]:
    """A data sample with what was found, as metrics take it."""
    if isinstance(found, dict):
        names = dict(scores='scores', bboxes='boxes', labels='labels', masks='masks')
        objects = InstanceData()
        for name, own in names.items():
            if own in found:
                objects[name] = torch.from_numpy(found[own])
        sample.pred_instances = objects
    else:
        sample.pred_sem_seg = PixelData(data=torch.from_numpy(found)[None])
    return sample.to_dict()


if __name__ == '__main__':
    main()
