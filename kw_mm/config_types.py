"""Looks into configs, both those made of dicts and those in pure Python."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def type_name(cfg: Any) -> str:
    """The bare name of the type that a config dict builds; empty if it has none.

    Configs in pure Python contain the class, others its name, which may begin with a toolbox and a
    dot.
    """
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    return '' if kind is None else getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def innermost_dataset(dataset: Any) -> Any:
    """The config of the data set inside wrappers such as ``RepeatDataset``."""
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset


def all_dicts(node: Any, path: str = '') -> Iterator[tuple[str, Any]]:
    """All dicts inside nested dicts, lists and tuples, each with its path.

    Args:
        node: Where to look; if it is a dict, it comes first.
        path: Its path.
    """
    items: Any = ()
    if isinstance(node, Mapping):
        yield path, node
        items = list(node.items())  # callers may change the dict
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    for key, child in items:
        yield from all_dicts(child, f'{path}.{key}' if path else str(key))


def without_downloads_(model: Any) -> Any:
    """Takes out, in place, what a model's config would load from checkpoints; returns it."""
    for _, node in all_dicts(model):
        if 'checkpoint' in str(node.get('init_cfg')):
            node['init_cfg'] = None
        if 'pretrained' in node:
            node['pretrained'] = None
    return model
