"""Checks that the files of a data set are there, and that its images can be read."""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import TRANSFORMS

from ..config_types import type_name
from .check_report import CheckedSet, Findings, counted


def is_local(dataset: Any) -> bool:
    """Whether the files of a data set are read from disks."""
    backend = getattr(dataset, 'backend_args', None) or {}
    paths = [dataset.ann_file, *(getattr(dataset, 'data_prefix', None) or {}).values()]
    return (backend.get('backend', 'local') in ('local', 'disk')
            and not any('://' in path for path in paths if isinstance(path, str)))


def missing_file(path: Any) -> str | None:
    """A path and where it looks as if it ended, if there is nothing; else None."""
    if not isinstance(path, (str, os.PathLike)) or not str(path) or os.path.exists(path):
        return None
    there = next((str(parent) for parent in Path(path).parents if parent.exists()), None)
    return f'{str(path)!r} does not exist ({there!r} does)'


def missing_files(paths: Sequence[str]) -> list[str]:
    """Those that do not exist; a folder is listed once, for a data set has many files in few."""
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder or '.'))
            except OSError:
                listed[folder] = set()
        # Names that differ in case alone are the same on some disks.
        if name not in listed[folder] and not os.path.exists(path):
            missing.append(path)
    return missing


def spread(items: Sequence[Any], num: int | None) -> Sequence[Any]:
    """At most so many of the items, evenly spread."""
    if num is None or len(items) <= num:
        return items
    return [items[index * len(items) // num] for index in range(num)]


def check_images(infos: Sequence[Mapping[str, Any]] | None, task: CheckedSet,
                 found: Findings) -> None:
    """Checks that images are there, can be read, and have the size that is said of them.

    Args:
        infos: What the data set says of each image; None if that is not known.
        task: What else is known of it.
        found: Where to put what is found.
    """
    if not infos:
        return
    load = Loading(task.pipeline, 'Image')
    paths = [info['img_path'] for info in infos]
    missing = missing_files(paths)
    if missing:
        report = found.warn if load.may_skip else found.error
        report(f'{task.where}: {counted(missing, len(paths), "images")} do not exist')
    gone = set(missing)
    unreadable, resized, reason = [], [], ''
    readable = spread([info for info in infos if info['img_path'] not in gone], task.sample)
    for info in load.each(readable, task, found, 'images'):
        image, error = load(info)
        if image is None:
            unreadable.append(info['img_path'])
            reason = reason or error
        elif 'height' in info and image.shape[:2] != (info['height'], info['width']):
            resized.append(info['img_path'])
    if unreadable:
        report = found.warn if load.may_skip else found.error
        report(f'{task.where}: {counted(unreadable, len(readable), "images read")} cannot be read'
               f'{reason}')
    if resized:
        found.warn(f'{task.where}: {counted(resized, len(readable), "images read")} have another '
                   'size than the annotations say, so that boxes may lie elsewhere')


class Loading:
    """The transform of a pipeline that loads images or annotations, as training would use it.

    Args:
        pipeline: Of a data set, as in the config.
        what: ``'Image'`` or ``'Annotations'``, in the name of the transform.
    """

    def __init__(self, pipeline: Sequence[Any], what: str) -> None:
        self.cfg: Any = None
        self.transform: Any = None
        self.failure = ''
        for cfg in pipeline:
            name = type_name(cfg)
            if name.startswith('Load') and what in name:
                self.cfg = cfg
                break
        # One for annotations is asked here for label maps alone.
        self.key = 'img' if what == 'Image' else 'gt_seg_map'
        if self.cfg is not None:
            try:
                self.transform = TRANSFORMS.build(dict(self.cfg))
            except Exception as error:  # of someone else's transform
                self.failure = f' ({type(error).__name__}: {error})'

    @property
    def may_skip(self) -> bool:
        """Whether what cannot be read is replaced by something else in training."""
        return self.transform is None or bool(self.cfg.get('ignore_empty'))

    def each(self, infos: Sequence[Any], task: CheckedSet, found: Findings,
             what: str) -> Iterator[Any]:
        """Those of the infos that are to be read, with progress; none without a transform."""
        if self.transform is None:
            found.note(f'{task.where}: {what} are not read, for the pipeline has no transform of '
                       f'its own that could be built for it{self.failure}')
            return
        if task.progress:
            task.progress(len(infos))
        for info in infos:
            yield info
            if task.progress:
                task.progress(None)

    def __call__(self, info: Mapping[str, Any]) -> tuple[Any, str]:
        """What is loaded, or None and why."""
        try:
            loaded = self.transform({**info, 'seg_fields': []})
        except Exception as error:  # what a training would end in
            return None, f' ({type(error).__name__}: {error})'
        return (None, ' (it is skipped)') if loaded is None else (loaded[self.key], '')
