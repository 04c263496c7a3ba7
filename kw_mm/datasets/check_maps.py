"""Checks images and their label maps as MMSegmentation's ``BaseSegDataset`` reads them."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import cv2
import numpy as np
from mmengine.registry import TRANSFORMS

from .check_files import Loading, check_images, missing_file, missing_files, spread
from .check_report import CheckedSet, Findings, counted, named, registered

_IGNORED = 255  # the label that the losses of MMSegmentation ignore by default


def is_plain_segmentation(cls: Any) -> bool:
    """Whether a data set is read in the way of ``BaseSegDataset``."""
    try:
        from mmseg.datasets import BaseSegDataset
    except ImportError:
        return False
    return (issubclass(cls, BaseSegDataset)
            and cls.load_data_list is BaseSegDataset.load_data_list)


def check_maps(dataset: Any, task: CheckedSet, found: Findings) -> None:
    """Checks that each image has a label map, and that the labels are classes.

    Args:
        dataset: The data set, not initialised.
        task: What else is known about it.
        found: Collects the findings.
    """
    where, folders = task.where, dataset.data_prefix
    classes = dataset.metainfo.get('classes')
    if isinstance(classes, str):
        found.error(f'{where}: metainfo.classes must be a tuple of names, got {classes!r}; a '
                    f'tuple of one has a comma: ({classes!r}, )')
        return
    lacking = [missing_file(path) for path in (
        folders.get('img_path'), folders.get('seg_map_path'), dataset.ann_file)]
    for what, missing in zip(('image folder', 'label map folder', 'list of images'), lacking):
        if missing:
            found.error(f'{where}: {what} {missing}')
    if any(lacking):
        return
    dataset.serialize_data = False  # fails with an empty list
    dataset.full_init()  # lists files, or reads their names from a file
    infos = [dataset.get_data_info(index) for index in range(len(dataset))]
    if not infos:
        found.error(f'{where}: no file in {folders["img_path"]} ends in {dataset.img_suffix!r} '
                    f'(img_suffix); {_suffixes(folders["img_path"])}')
        return
    for place, num in task.num_classes.items():
        if classes is not None and num != len(classes):
            found.warn(f'{where}: {place}.num_classes is {num}, but metainfo has {len(classes)} '
                       'classes')
    found.summaries.append(f'{where}: {len(infos)} images with label maps')
    check_images(infos, task, found)
    load = Loading(task.pipeline, 'Annotations')
    if load.cfg is None or not infos[0].get('seg_map_path'):
        return
    paths = [info['seg_map_path'] for info in infos]
    absent = missing_files(paths)
    if absent:
        found.error(f'{where}: {counted(absent, len(paths), "label maps")} do not exist; each '
                    f'is named after its image, with {dataset.seg_map_suffix!r} '
                    f'(seg_map_suffix) for {dataset.img_suffix!r} (img_suffix)')
    gone = set(absent)
    _check_labels(dataset, [info for info in infos if info['seg_map_path'] not in gone], load,
                  task, found)


def _check_labels(dataset: Any, infos: list[Mapping[str, Any]], load: Loading, task: CheckedSet,
                  found: Findings) -> None:
    where, classes = task.where, dataset.metainfo.get('classes') or ()
    num_classes = max([len(classes), *task.num_classes.values()])
    allowed = {*range(num_classes), _IGNORED, dataset.ignore_index}
    read = spread(infos, task.sample)
    seen: set[int] = set()
    faults: dict[str, list[str]] = {}
    unknown: Counter[int] = Counter()
    reason = ''
    for info in load.each(read, task, found, 'label maps'):
        labels, error = load(info)
        if labels is None:
            faults.setdefault('cannot be read', []).append(info['seg_map_path'])
            reason = reason or error
            continue
        if labels.ndim != 2:
            faults.setdefault('have colours where each pixel must be the number of its class',
                              []).append(info['seg_map_path'])
            continue
        values = set(np.unique(labels).tolist())
        seen |= values
        if values - allowed:
            faults.setdefault('have labels that are no class', []).append(info['seg_map_path'])
            unknown.update(values - allowed)
        size = _size(info['img_path'])
        if size is not None and labels.shape != size:
            faults.setdefault('have another size than their image', []).append(
                info['seg_map_path'])
    # Other transforms may change labels.
    report = found.error if _only_known(task.pipeline) else found.warn
    for kind, paths in faults.items():
        sentence = f'{where}: {counted(paths, len(read), "label maps read")} {kind}'
        if kind.endswith('no class'):
            sentence += (f': {named(sorted(unknown), len(unknown))}, but there are {num_classes} '
                         f'classes, from 0, and {_IGNORED} for what is to be ignored')
        report(sentence + (reason if kind == 'cannot be read' else ''))
    absent = [repr(name) for index, name in enumerate(classes) if index not in seen]
    if absent and seen:
        found.warn(f'{where}: {counted(absent, len(classes), "classes")} are in none of the '
                   f'{len(read)} label maps read')


def _size(path: str) -> tuple[int, int] | None:
    image = cv2.imread(path, cv2.IMREAD_UNCHANGED)
    return None if image is None else image.shape[:2]


def _only_known(pipeline: Any) -> bool:
    for transform in pipeline:
        kind = transform.get('type') if isinstance(transform, Mapping) else type(transform)
        cls = registered(TRANSFORMS, kind)
        if cls is None or cls.__module__.partition('.')[0] not in ('mmcv', 'mmdet', 'mmseg'):
            return False
    return True


def _suffixes(folder: str) -> str:
    endings = Counter(os.path.splitext(name)[1] for _, _, names in os.walk(folder)
                      for name in names)
    if not endings:
        return 'there is no file at all'
    return 'there are ' + ', '.join(f'{num} that end in {ending!r}'
                                    for ending, num in endings.most_common(3))
