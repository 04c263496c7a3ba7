"""The arms of a comparison: configs that are to be trained alike."""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from ...config_types import all_dicts, type_name
from ...datasets import check_data
from ...files import replace_text

# What is the same in all arms, or they would not be compared but confused.
SAME = ('default_scope', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'val_evaluator',
        'test_evaluator', 'train_cfg')
# What is looked through for other differences, which are reported.
REPORTED = ('model', 'optim_wrapper', 'param_scheduler', 'custom_hooks', 'default_hooks',
            'randomness', 'load_from')
# So many images of a data set are read before anything is trained.
SAMPLE, MAX_JSON = 64, 100 * 2**20


@dataclass(frozen=True)
class Arm:
    """A config that is trained once for each seed.

    Attributes:
        name: Of the config's file.
        path: Of the config as it is trained.
        cfg: The same.
        num_parameters: Of the whole model.
    """

    name: str
    path: str
    cfg: Config
    num_parameters: int


def prepare_arms(configs: Mapping[str, Config], folder: Path) -> list[Arm]:
    """Makes configs trainable alike, checks all of them, and writes them into a folder.

    Backbone and neck get random numbers of their own (``WithOwnRandomNumbers``), so that heads,
    batches and augmentations of a seed are the same in all arms, and ``RandomStateHook`` keeps them
    the same after an interruption. Each model is built once, and a sample of the data is read.

    Args:
        configs: By name; the first is what the others are compared with. They are changed.
        folder: Where to write them; it must exist.

    Raises:
        ValueError: If the arms differ in their data, evaluation or length, if data sets cannot be
            used, or if the folder has other configs of these names.
    """
    first, *others = configs
    for name in others:
        unlike = [line for key in SAME for line in list_differences(
            configs[first].get(key), configs[name].get(key), key)]
        if unlike:
            raise ValueError(f'{name} must be trained and tested like {first}, but differs in '
                             + '; '.join(unlike))
    found = check_data(configs[first], ('train_dataloader', 'val_dataloader', 'test_dataloader'),
                       SAMPLE, MAX_JSON)
    if found.errors:
        raise ValueError('\n'.join(['the data sets cannot be used as they are:', *found.errors]))
    arms = []
    for name, cfg in configs.items():
        _equalise_(cfg)
        arms.append(Arm(name, str(folder / f'{name}.py'), cfg, count_parameters(build_model(cfg))))
    for arm in arms:
        _write(arm)
    return arms


def _equalise_(cfg: Config) -> None:
    for part in ('backbone', 'neck'):
        inner = cfg.model.get(part)
        if inner is not None:
            cfg.model[part] = dict(type='WithOwnRandomNumbers', module=inner)
    hooks = cfg.get('custom_hooks') or []
    if all(type_name(hook) != 'RandomStateHook' for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type='RandomStateHook')]
    # Workers that go on from epoch to epoch have random states that no checkpoint knows.
    cfg.train_dataloader.persistent_workers = False


def build_model(cfg: Config) -> nn.Module:
    """The model of a config, not initialised.

    Raises:
        ValueError: If it cannot be built.
    """
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')), torch.random.fork_rng():
        try:
            return MODELS.build(cfg.model)
        except Exception as error:
            raise ValueError(f'the model of {cfg.filename} cannot be built: {error}') from error


def count_parameters(model: nn.Module) -> int:
    """All of them, frozen ones included."""
    return sum(parameter.numel() for parameter in model.parameters())


def _write(arm: Arm) -> None:
    text = arm.cfg.pretty_text
    path = Path(arm.path)
    if path.exists() and path.read_text() != text:
        raise ValueError(f'{path} is from a comparison with other settings; give another --out, or '
                         'remove the folder')
    replace_text(path, text)


def list_differences(a: Any, b: Any, path: str = '') -> list[str]:
    """Where two parts of configs differ, one line for each place: ``path: a | b``."""
    return [f'{where}: {_short(x)} | {_short(y)}' for where, x, y in _differences(a, b, path)]


def _differences(a: Any, b: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            yield from _differences(a.get(key), b.get(key), f'{path}.{key}' if path else str(key))
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b)):
            yield from _differences(x, y, f'{path}[{index}]')
    elif a != b:
        yield path, a, b


def _short(value: Any, length: int = 120) -> str:
    text = ' '.join(repr(value).split())
    return text if len(text) <= length else f'{text[:length]}...'


def use_own_data_(cfg: Config, train: Sequence[str], val: Sequence[str]) -> None:
    """Points a detector's config to data in COCO's format.

    Args:
        cfg: Config of a detector on a ``CocoDataset``; changed.
        train: Annotation file and folder of the training images. Its categories are the classes.
        val: The same of the images that are tested on.

    Raises:
        FileNotFoundError: If a file or folder is missing.
        ValueError: If the config has another kind of data, or an annotation file no categories.
    """
    for _, images in (train, val):
        if not Path(images).is_dir():
            raise FileNotFoundError(f'the folder of images {images} does not exist')
    classes, others = _read_classes(train[0]), _read_classes(val[0])
    if set(others) - set(classes):
        raise ValueError(f'{val[0]} has categories that {train[0]} lacks: '
                         f'{sorted(set(others) - set(classes))}')
    for loader, (ann_file, images) in (('train_dataloader', train), ('val_dataloader', val),
                                          ('test_dataloader', val)):
        leaves = [node for _, node in all_dicts(cfg[loader].dataset) if 'ann_file' in node]
        if not leaves or any(type_name(leaf) != 'CocoDataset' for leaf in leaves):
            raise ValueError(f'{loader} of {cfg.filename} must have data sets of type CocoDataset, '
                             f'got {[type_name(leaf) for leaf in leaves]}')
        for leaf in leaves:
            leaf.update(data_root='', ann_file=str(ann_file), data_prefix=dict(img=str(images)),
                        metainfo=dict(classes=tuple(classes)))
    for evaluator in ('val_evaluator', 'test_evaluator'):
        for _, node in all_dicts(cfg[evaluator]):
            if 'ann_file' in node:
                node.ann_file = str(val[0])
    for _, node in all_dicts(cfg.model):
        if 'num_classes' in node:
            node.num_classes = len(classes)


def _read_classes(ann_file: str) -> list[str]:
    try:
        categories = json.loads(Path(ann_file).read_text())['categories']
        names = [category['name'] for category in categories]
    except FileNotFoundError:
        raise FileNotFoundError(f'the annotation file {ann_file} does not exist') from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{ann_file} must be a file in COCO's format whose categories have "
                         f'names: {error!r}') from error
    if not names:
        raise ValueError(f'{ann_file} must have at least one category')
    return names
