"""Checks the data sets of a config before a model is built for them.

Faults that are certain to end a training are errors; faults that may spoil it are warnings. Data
sets of other types pass, and a note says what was not checked.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope

from ..config_types import all_dicts
from .check_coco import check_coco, is_plain_coco
from .check_files import check_images, is_local, missing_file
from .check_maps import check_maps, is_plain_segmentation
from .check_report import CheckedSet, Findings, registered

__all__ = ['Findings', 'check_data']

# Types that wrap data sets, by the argument that has them.
_WRAPPED = ('dataset', 'datasets')


def check_data(cfg: Mapping[str, Any],
               loaders: Sequence[str] = ('train_dataloader', 'val_dataloader'),
               sample: int | None = None, max_json: int | None = None,
               progress: Any = None) -> Findings:
    """Checks the data sets of the given loaders, and the files that metrics read.

    Args:
        cfg: Config of a detector or segmentor.
        loaders: Keys of the config. Keys that it does not have are skipped.
        sample: How many images, and label maps, of a data set to read at most, evenly spread; None
            for all. Whether files exist is checked for all of them.
        max_json: Annotation files with more bytes are not read; None to read any.
        progress: Called with the number of images to read, and with None after each.
    """
    found = Findings()
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        for loader in loaders:
            settings = cfg.get(loader)
            if settings is None:
                continue
            dataset = settings.get('dataset') if isinstance(settings, Mapping) else None
            leaves = list(_leaves(loader.removesuffix('_dataloader'), dataset))
            for where, leaf in leaves:
                _check(leaf, CheckedSet(where, leaf.get('pipeline') or (), _num_classes(
                    cfg.get('model')), sample, max_json, progress), found)
            if not leaves:
                found.note(f'{loader}: its data set is not a plain config, and not checked')
            _check_metrics(cfg, loader.replace('dataloader', 'evaluator'), found)
    return found


def _leaves(where: str, dataset: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The data sets inside wrappers, e.g. those that repeat or concatenate."""
    if isinstance(dataset, (list, tuple)):
        for index, item in enumerate(dataset):
            yield from _leaves(f'{where}[{index}]', item)
    elif isinstance(dataset, Mapping):
        inner = [key for key in _WRAPPED if key in dataset]
        if not inner:
            yield where, dataset
        for key in inner:
            yield from _leaves(where, dataset[key])


def _check(cfg: Mapping[str, Any], task: CheckedSet, found: Findings) -> None:
    """Checks one data set as far as its kind is known."""
    kind = cfg.get('type')
    name = getattr(kind, '__name__', kind)
    cls = registered(DATASETS, kind)
    if cls is None or not issubclass(cls, BaseDataset):
        found.note(f'{task.where}: data sets of type {name} are not checked')
        return
    try:
        # Nothing is read, but afterwards paths are joined and classes are known.
        dataset = cls(**{key: value for key, value in cfg.items()
                         if key not in ('type', '_scope_', 'pipeline', 'lazy_init')},
                      pipeline=[], lazy_init=True)
    except Exception as error:  # data sets from elsewhere may raise anything
        found.note(f'{task.where}: the {name} is not checked, for it cannot be made without '
                   f'reading it ({type(error).__name__}: {error})')
        return
    if not is_local(dataset):
        found.note(f'{task.where}: its files are not on a disk of this machine, and not checked')
    elif is_plain_coco(cls):
        check_images(check_coco(dataset, task, found), task, found)
    elif is_plain_segmentation(cls):
        check_maps(dataset, task, found)
    else:
        missing = missing_file(dataset.ann_file)
        # Other types of data sets may use this argument differently.
        if missing and cls.__module__.partition('.')[0] in ('mmdet', 'mmseg'):
            found.error(f'{task.where}: annotation file {missing}')
        found.note(f'{task.where}: what is in the files of a {name} is not checked')


def _num_classes(model: Any) -> dict[str, int]:
    """The numbers of classes in the config of a model, by their places."""
    return {path: node['num_classes'] for path, node in all_dicts(model, 'model')
            if isinstance(node.get('num_classes'), int)}


def _check_metrics(cfg: Mapping[str, Any], evaluator: str, found: Findings) -> None:
    metrics = cfg.get(evaluator) or ()
    for metric in metrics if isinstance(metrics, (list, tuple)) else [metrics]:
        if not isinstance(metric, Mapping) or metric.get('backend_args'):
            continue
        path = metric.get('ann_file')
        missing = isinstance(path, str) and missing_file(path)
        if missing:
            found.error(f'{evaluator}: ann_file {missing}')
        loader = cfg.get(evaluator.replace('evaluator', 'dataloader')) or {}
        dataset = loader.get('dataset') if isinstance(loader, Mapping) else None
        own = dataset.get('ann_file') if isinstance(dataset, Mapping) else None
        if path and own and not Path(path).as_posix().endswith(Path(own).as_posix()):
            found.warn(f'{evaluator}: ann_file is {path!r}, but the data set reads {own!r}; '
                       'the two must be the same file')
