"""The shapes data set on disk: images, annotations of two kinds, and how they were made.

    root/train/000000.jpg ...   root/val/000000.jpg ...                          images
    root/annotations/instances_train.json   root/annotations/instances_val.json  COCO
    root/annotations/semantic_train/000000.png ...   .../semantic_val/...        label maps
    root/shapes.json                                                             parameters
"""
from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from ..files import remove_unfinished, replacing, write_json
from .annotations import encode_instance, semantic_map
from .drawing import SHAPE_CLASSES, SPLITS, check_int, check_size, draw_scene

# Must be increased when the same parameters give other images or annotations.
FORMAT_VERSION = 1

_RECORD = 'shapes.json'
_UNFINISHED = 'shapes.unfinished.json'
# Full colour resolution, because small shapes often differ from the background in colour only.
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 95,
         cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]


@dataclass(frozen=True)
class ShapesFiles:
    """Where a data set lies.

    Args:
        root: Its folder.
        written: Whether this call wrote it; ``False`` if it was there and complete already.
    """

    root: Path
    written: bool

    def images(self, split: str) -> Path:
        """Folder of the images of a split, ``data_prefix`` of a config."""
        return self.root / split

    def annotations(self, split: str) -> Path:
        """COCO file of a split, ``ann_file`` of a config."""
        return self.root / 'annotations' / f'instances_{split}.json'

    def semantic_maps(self, split: str) -> Path:
        """Folder of the label maps of a split, named as the images; 0 is the background."""
        return self.root / 'annotations' / f'semantic_{split}'


def write_shapes(root: str | os.PathLike,
                 num_train: int = 1200,
                 num_val: int = 200,
                 size: int | Sequence[int] = 128,
                 seed: int = 0,
                 progress: bool = False,
                 overwrite: bool = False) -> ShapesFiles:
    """Write the train and val splits as COCO instance segmentation and semantic label maps.

    Every file gets its name only when it is complete, and ``shapes.json`` with the parameters comes
    last. So a complete data set with the same parameters is not changed, and one that was
    interrupted or has lost files is written again, with the same bytes.

    Args:
        root: Folder of the data set; made if missing.
        num_train: Number of training images, at least 1.
        num_val: Number of validation images, at least 1.
        size: Side of square images or ``(width, height)``, in pixels, at least 32.
        seed: Seed of the data set, at least 0.
        progress: Whether to show a progress bar with the time left on stderr.
        overwrite: Whether to replace a shapes data set, whatever its parameters.

    Returns:
        Where everything is, and whether it was written now.

    Raises:
        TypeError: If a number is not an integer.
        ValueError: If an argument is out of range, ``root`` holds a shapes data set of other
            parameters and ``overwrite`` is not set, or ``root`` holds another data set.
    """
    width, height = check_size(size)
    counts = dict(zip(SPLITS, (check_int('num_train', num_train, 1),
                               check_int('num_val', num_val, 1))))
    parameters = dict(
        version=FORMAT_VERSION,
        num_train=counts['train'],
        num_val=counts['val'],
        size=[width, height],
        seed=check_int('seed', seed, 0),
        classes=list(SHAPE_CLASSES))

    root = Path(root)
    if not overwrite:
        _check_same(root, parameters)
    _check_own(root)
    if not overwrite and _is_whole(root, counts):
        return ShapesFiles(root, written=False)

    files = ShapesFiles(root, written=True)
    for folder in (*map(files.images, SPLITS), *map(files.semantic_maps, SPLITS)):
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)
    # From here to the end the folder is marked as ours, but incomplete.
    _write_json(root / _UNFINISHED, parameters)
    (root / _RECORD).unlink(missing_ok=True)
    bar = _progress_bar(sum(counts.values())) if progress else None
    for split, num in counts.items():
        for folder, names in _numbered_files(files, split, num).items():
            _remove_surplus(folder, names)
        _write_split(files, split, num, parameters, bar)
    if bar is not None:
        bar.file.write('\n')
    _write_json(root / _RECORD, parameters)
    (root / _UNFINISHED).unlink(missing_ok=True)
    return files


def describe_shapes(files: ShapesFiles) -> str:
    """A short table of what a data set holds: images, instances per class, crowds."""
    lines = [f'{"":<12}' + ''.join(f'{split:>8}' for split in SPLITS)]
    rows: dict[str, list[int]] = {name: [] for name in ('images', *SHAPE_CLASSES, 'crowds')}
    for split in SPLITS:
        coco = json.loads(files.annotations(split).read_text())
        rows['images'].append(len(coco['images']))
        single = [a['category_id'] for a in coco['annotations'] if not a['iscrowd']]
        for category in coco['categories']:
            rows[category['name']].append(single.count(category['id']))
        rows['crowds'].append(len(coco['annotations']) - len(single))
    lines += [f'{name:<12}' + ''.join(f'{n:>8}' for n in row) for name, row in rows.items()]
    return '\n'.join(lines)


def _write_split(files: ShapesFiles, split: str, num: int, parameters: dict[str, Any],
                 bar: Any) -> None:
    width, height = parameters['size']
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(num):
        image, instances = draw_scene(parameters['seed'], split, index, (width, height))
        name = _file_name(index, '.jpg')
        _write_bytes(files.images(split) / name, cv2.imencode('.jpg', image, _JPEG)[1].tobytes())
        _write_bytes(files.semantic_maps(split) / _file_name(index, '.png'),
                     cv2.imencode('.png', semantic_map(instances))[1].tobytes())
        # Ids start at 1, because COCO's evaluation takes an annotation with id 0 for "no match".
        images.append(dict(id=index + 1, file_name=name, width=width, height=height))
        for instance in instances:
            annotations.append(dict(id=len(annotations) + 1, image_id=index + 1,
                                    **encode_instance(instance)))
        if bar is not None:
            bar.update()
    _write_json(files.annotations(split), dict(
        info=dict(description='Generated shapes', version=str(FORMAT_VERSION)),
        images=images,
        categories=[dict(id=i, name=name, supercategory='shape')
                    for i, name in enumerate(SHAPE_CLASSES, 1)],
        annotations=annotations))


def _check_same(root: Path, parameters: dict[str, Any]) -> None:
    for name in (_RECORD, _UNFINISHED):
        path = root / name
        if not path.exists():
            continue
        try:
            found = dict(json.loads(path.read_text()))
        except (ValueError, TypeError):
            raise ValueError(f'root: {path} does not hold the parameters of a shapes data set; '
                             'choose another folder, or overwrite it (overwrite=True, '
                             '--overwrite)') from None
        differences = [
            f'{key} is {found.get(key)}, asked for {parameters.get(key)}'
            for key in sorted(found.keys() | parameters.keys())
            if found.get(key) != parameters.get(key)
        ]
        if differences:
            raise ValueError(f'root: {root} holds a shapes data set of other parameters '
                             f'({"; ".join(differences)}); choose another folder, or overwrite '
                             'it (overwrite=True, --overwrite)')


def _check_own(root: Path) -> None:
    """Refuses a folder in which others have files with the names that would be written."""
    if root.exists() and not root.is_dir():
        raise ValueError(f'root must be a folder, {root} is a file')
    if (root / _RECORD).exists() or (root / _UNFINISHED).exists():
        return
    for name in (*SPLITS, 'annotations'):
        folder = root / name
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ValueError(f'root: {root} has a {name!r} that is not of a shapes data set '
                             f'(there is no {_RECORD}); choose another folder')


def _is_whole(root: Path, counts: dict[str, int]) -> bool:
    if not (root / _RECORD).exists() or (root / _UNFINISHED).exists():
        return False
    files = ShapesFiles(root, written=False)
    return all(
        files.annotations(split).is_file() and all(
            folder.is_dir() and names <= _non_empty_files(folder)
            for folder, names in _numbered_files(files, split, num).items())
        for split, num in counts.items())


def _non_empty_files(folder: Path) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.name for entry in entries if entry.stat().st_size}


def _numbered_files(files: ShapesFiles, split: str, num: int) -> dict[Path, set[str]]:
    """The folders of a split with a file for each image, and what is in them."""
    return {folder: {_file_name(index, suffix) for index in range(num)}
            for folder, suffix in ((files.images(split), '.jpg'),
                                   (files.semantic_maps(split), '.png'))}


def _remove_surplus(folder: Path, names: set[str]) -> None:
    # Removes files of a larger data set that is overwritten; files with other names stay.
    for name in os.listdir(folder):
        if re.fullmatch(r'\d{6,}\.(jpg|png)', name) and name not in names:
            (folder / name).unlink()


def _file_name(index: int, suffix: str) -> str:
    return f'{index:06d}{suffix}'


def _write_json(path: Path, value: Any) -> None:
    write_json(path, value, separators=(',', ':'))


def _write_bytes(path: Path, data: bytes) -> None:
    # Waiting for the disk would take too long with thousands of files. After a power failure, an
    # incomplete file is recognised by its size.
    with replacing(path, durable=False) as stream:
        stream.write(data)


def _progress_bar(total: int) -> Any:
    from mmengine.utils import ProgressBar
    return ProgressBar(total, file=sys.stderr)
