"""Checks that the files of a data set exist, and that its images can be read."""
from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import TRANSFORMS

from ..config_types import type_name
from .check_report import CheckedSet, Findings, counted


def is_local(dataset: Any) -> bool:
    """Whether the files of a data set are read from local disks."""
    backend = getattr(dataset, 'backend_args', None) or {}
    paths = [dataset.ann_file, *(getattr(dataset, 'data_prefix', None) or {}).values()]
    return (backend.get('backend', 'local') in ('local', 'disk')
            and not any('://' in path for path in paths if isinstance(path, str)))


def missing_file(path: Any) -> str | None:
    """A path that does not exist, with the part of it that does; None if it exists."""
    if not isinstance(path, (str, os.PathLike)) or not str(path) or os.path.exists(path):
        return None
    there = next((str(parent) for parent in Path(path).parents if parent.exists()), None)
    return f'{str(path)!r} does not exist ({there!r} does)'


def missing_files(paths: Sequence[str]) -> list[str]:
    """The paths that do not exist. Each folder is read once, because most files share a few."""
    listed: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in listed:
            try:
                listed[folder] = set(os.listdir(folder or '.'))
            except OSError:
                listed[folder] = set()
        # On some disks names that differ only in case are the same.
        if name not in listed[folder] and not os.path.exists(path):
            missing.append(path)
    return missing


def spread(items: Sequence[Any], num: int | None) -> Sequence[Any]:
    """At most so many of the items, evenly spaced."""
    if num is None or len(items) <= num:
        return items
    return [items[index * len(items) // num] for index in range(num)]


def check_images(infos: Sequence[Mapping[str, Any]] | None, task: CheckedSet,
                 found: Findings) -> None:
    """Checks that images exist, can be read, and have the size that the annotations say.

    Args:
        infos: What the data set says about each image; None if that is not known.
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
    """The transform of a pipeline that loads images or annotations, used as in training.

    Args:
        pipeline: Pipeline of a data set, as in the config.
        what: ``'Image'`` or ``'Annotations'``, part of the transform's name.
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
        # Of annotations, only label maps are loaded here.
        self.key = 'img' if what == 'Image' else 'gt_seg_map'
        if self.cfg is not None:
            try:
                self.transform = TRANSFORMS.build(dict(self.cfg))
            except Exception as error:  # for a transform from elsewhere
                self.failure = f' ({type(error).__name__}: {error})'

    @property
    def may_skip(self) -> bool:
        """Whether training replaces files that cannot be read."""
        return self.transform is None or bool(self.cfg.get('ignore_empty'))

    def each(self, infos: Sequence[Any], task: CheckedSet, found: Findings,
             what: str) -> Iterator[Any]:
        """The infos to be read, with progress; none if there is no such transform."""
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
        """What is loaded, or None and the reason why not."""
        try:
            loaded = self.transform({**info, 'seg_fields': []})
        except Exception as error:  # training would end with it
            return None, f' ({type(error).__name__}: {error})'
        return (None, ' (it is skipped)') if loaded is None else (loaded[self.key], '')
