"""Checks annotations in COCO's format as MMDetection's ``CocoDataset`` reads them."""
from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from .check_files import Loading, missing_file
from .check_report import CheckedSet, Findings, counted, named

_EDGE = 1  # pixels by which a box may exceed the image because of rounding


def is_plain_coco(cls: type) -> bool:
    """Whether a data set is read in the way of ``CocoDataset``."""
    try:
        from mmdet.datasets import CocoDataset
    except ImportError:
        return False
    return issubclass(cls, CocoDataset) and all(
        getattr(cls, name) is getattr(CocoDataset, name)
        for name in ('load_data_list', 'parse_data_info'))


def check_coco(dataset: Any, task: CheckedSet, found: Findings) -> list[dict[str, Any]] | None:
    """Checks the annotation file, and the classes of a config against it.

    Args:
        dataset: The data set, not initialised.
        task: What else is known about it.
        found: Collects the findings.

    Returns:
        What is known about each image that will be used; None if the file cannot be read.
    """
    where, path = task.where, dataset.ann_file
    missing = missing_file(path) if path else '(ann_file) is not set'
    if missing:
        found.error(f'{where}: annotation file {missing}')
        return None
    if task.max_json is not None and os.path.getsize(path) > task.max_json:
        found.note(f'{where}: {path} is large, and what is in it not checked here '
                   '(tools/analysis_tools/check_data.py does it)')
        return None
    coco = _read(path, where, found)
    if coco is None or not _has_fields(coco, where, path, found):
        return None
    classes = dataset.metainfo['classes']
    if not _check_classes(classes, coco['categories'], task, path, found):
        return None
    annotations = _Annotations(coco, classes, Loading(task.pipeline, 'Annotations').cfg or {})
    annotations.report(where, path, found)
    images = _subset(_kept(dataset, coco, annotations), dataset._indices)
    if not dataset.test_mode and not found.errors and not (images and annotations.num_kept):
        found.error(f'{where}: nothing of {path} is left to train on: of {len(coco["images"])} '
                    f'images and {len(coco["annotations"])} annotations {len(images)} images and '
                    f'{annotations.num_kept} boxes can be used')
    found.summaries.append(f'{where}: {len(images)} images, {annotations.num_kept} boxes')
    prefix = dataset.data_prefix.get('img') or ''
    return [dict(img_path=os.path.join(prefix, image['file_name']), height=image['height'],
                 width=image['width'], img_id=image['id']) for image in images]


def _read(path: str, where: str, found: Findings) -> dict[str, list] | None:
    try:
        with open(path, encoding='utf-8') as stream:
            coco = json.load(stream)
    except (OSError, ValueError) as error:
        found.error(f'{where}: annotation file {path!r} cannot be read as JSON ({error})')
        return None
    # Files for testing have only images and categories.
    parts = {key: coco.get(key, []) for key in ('images', 'annotations', 'categories')
             } if isinstance(coco, dict) else {}
    if not parts or not all(isinstance(part, list) and all(isinstance(item, dict) for item in part)
                            for part in parts.values()) or not parts['images']:
        found.error(f"{where}: annotation file {path!r} must hold lists 'images', 'annotations' "
                    f"and 'categories', as COCO's do, got "
                    f'{sorted(coco) if isinstance(coco, dict) else type(coco).__name__}')
        return None
    return parts


def _has_fields(coco: Mapping[str, list], where: str, path: str, found: Findings) -> bool:
    fields = dict(images=('id', 'file_name', 'width', 'height'), categories=('id', 'name'),
                  annotations=('id', 'image_id', 'category_id', 'bbox', 'area'))
    whole = True
    for part, names in fields.items():
        lacking = Counter(name for item in coco[part] for name in names if name not in item
                          and not (part == 'annotations' and item.get('ignore')))
        for name, num in lacking.items():
            found.error(f'{where}: {num} of {len(coco[part])} {part} in {path} have no {name!r}')
            whole = False
    return whole


def _check_classes(classes: Any, categories: Sequence[Mapping[str, Any]], task: CheckedSet,
                   path: str, found: Findings) -> bool:
    """Compares a config's class names with the file's. False if no further check makes sense."""
    where = task.where
    if isinstance(classes, str):
        found.error(f'{where}: metainfo.classes must be a tuple of names, got {classes!r}; a '
                    f'tuple of one has a comma: ({classes!r}, )')
        return False
    names = [category['name'] for category in categories]
    known = [name for name in names if name in classes]
    listed = named(map(repr, names), len(names))
    if not known:
        found.error(f'{where}: none of metainfo.classes ({named(map(repr, classes), len(classes))})'
                    f' is a category of {path}, which has {len(names)}: {listed}')
        return False
    extra = [name for name in classes if name not in names]
    if extra:
        found.warn(f'{where}: {counted(list(map(repr, extra)), len(classes), "classes")} of '
                   f'metainfo have no category in {path}, which has {listed}')
    unused = [name for name in names if name not in classes]
    if unused:
        found.warn(f'{where}: {counted(list(map(repr, unused)), len(names), "categories")} of '
                   f'{path} are not in metainfo.classes, and left out')
    # Labels are numbered in the order of the file, not in that of the classes.
    wrong = [f'{name!r} as {shown!r}' for name, shown in zip(known, classes) if name != shown]
    if wrong:
        found.warn(f'{where}: metainfo.classes must be in the order of the categories in {path}, '
                   f'or objects are shown by wrong names: {named(wrong, len(wrong))}')
    for place, num in task.num_classes.items():
        if num != len(classes):
            found.warn(f'{where}: {place}.num_classes is {num}, but metainfo has {len(classes)} '
                       'classes')
    return True


class _Annotations:
    """The annotations of a file, sorted by how they are used.

    Args:
        coco: The file.
        classes: The classes to be detected.
        loading: The settings of the transform that loads annotations.
    """

    def __init__(self, coco: Mapping[str, list], classes: Sequence[str],
                 loading: Mapping[str, Any]) -> None:
        self.num, self.num_kept = len(coco['annotations']), 0
        self.with_mask = bool(loading.get('with_mask'))
        self.sizes = {image['id']: (image['width'], image['height']) for image in coco['images']}
        self.names = {image['id']: image['file_name'] for image in coco['images']}
        self.wanted = {category['id'] for category in coco['categories']
                       if category['name'] in classes}
        self.used_images: set[Any] = set()  # with wanted objects, even if their boxes are faulty
        ids = Counter(annotation['id'] for annotation in coco['annotations'])
        self.double = [key for key, num in ids.items() if num > 1]
        self.faults: dict[str, list[str]] = {}
        self.corners = 0
        for annotation in coco['annotations']:
            self._sort(annotation)

    def _sort(self, annotation: Mapping[str, Any]) -> None:
        image = annotation['image_id']
        label = f'annotation {annotation["id"]}'
        if image not in self.sizes:
            self._fault('belong to images that are not listed', label)
            return
        label += f' in {self.names[image]}'
        if annotation['category_id'] in self.wanted:
            self.used_images.add(image)
        if annotation.get('ignore'):
            return
        box = annotation['bbox']
        if not _is_box(box):
            self._fault('have no bbox of four finite numbers', label)
            return
        x, y, width, height = box
        image_width, image_height = self.sizes[image]
        if width < 1 or height < 1 or annotation['area'] <= 0:
            self._fault('are empty (a side or the area below 1)', label)
        elif x >= image_width or y >= image_height or x + width <= 0 or y + height <= 0:
            self._fault('lie outside of their image', label)
        elif annotation['category_id'] in self.wanted:
            self.num_kept += 1
            if (min(x, y) < -_EDGE or x + width > image_width + _EDGE
                    or y + height > image_height + _EDGE):
                self._fault('reach over the edge of their image', label)
                # It lies inside if its last two numbers are a corner.
                self.corners += x < width <= image_width + _EDGE and (
                    y < height <= image_height + _EDGE)
            if self.with_mask:
                self._check_mask(annotation.get('segmentation'), label)

    def _check_mask(self, mask: Any, label: str) -> None:
        if not mask:
            self._fault('have no segmentation', label)
        elif isinstance(mask, list) and not any(
                len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in mask):
            self._fault('have no polygon of three points or more, and are ignored', label)

    def _fault(self, kind: str, label: str) -> None:
        self.faults.setdefault(kind, []).append(label)

    def report(self, where: str, path: str, found: Findings) -> None:
        if self.double:
            found.error(f'{where}: {counted(self.double, self.num, "annotations")} in {path} have '
                        'the id of another one')
        for kind, labels in self.faults.items():
            sentence = f'{where}: {counted(labels, self.num, "boxes")} in {path} {kind}'
            if kind.startswith('reach') and 2 * self.corners > len(labels):
                sentence += '; they look like (x1, y1, x2, y2), but COCO has (x, y, width, height)'
            ends = kind.startswith('have no bbox') or kind == 'have no segmentation'
            if kind == 'have no segmentation':
                sentence += '; a model without masks needs none (configs/faster_rcnn)'
            (found.error if ends else found.warn)(sentence)


def _is_box(box: Any) -> bool:
    return isinstance(box, (list, tuple)) and len(box) == 4 and all(
        isinstance(side, (int, float)) and math.isfinite(side) for side in box)


def _kept(dataset: Any, coco: Mapping[str, list],
          annotations: _Annotations) -> list[Mapping[str, Any]]:
    """The images that ``CocoDataset`` uses."""
    images = list({image['id']: image for image in coco['images']}.values())
    rules = dataset.filter_cfg
    if dataset.test_mode or rules is None:
        return images
    return [image for image in images
            if min(image['width'], image['height']) >= rules.get('min_size', 0)
            and (image['id'] in annotations.used_images or not rules.get('filter_empty_gt'))]


def _subset(items: list, indices: int | Sequence[int] | None) -> list:
    """The entries that mmengine's ``indices`` choose."""
    if indices is None:
        return items
    if isinstance(indices, int):
        return items[:indices] if indices >= 0 else items[indices:]
    return [items[index] for index in indices]
