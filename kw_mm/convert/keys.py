"""Renaming the keys of state dicts with two-way tables."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar('Value')


def rename_keys(state_dict: Mapping[str, Value], table: Mapping[str, str]) -> dict[str, Value]:
    """Renames keys by their beginnings.

    Args:
        state_dict: What to rename.
        table: Paths of modules or parameters and what they are to be called. The longest one
            that a key begins with counts; keys that begin with none keep their names.

    Raises:
        ValueError: If two keys come out the same.
    """
    renamed: dict[str, Value] = {}
    for key, value in state_dict.items():
        parts = key.split('.')
        for length in range(len(parts), 0, -1):
            path = '.'.join(parts[:length])
            if path in table:
                key = '.'.join([table[path], *parts[length:]])
                break
        if key in renamed:
            raise ValueError(f'two keys of the state dict would be renamed to {key!r}')
        renamed[key] = value
    return renamed


def reverse(table: Mapping[str, str]) -> dict[str, str]:
    """The same table the other way.

    Raises:
        ValueError: If two entries have one new name.
    """
    back = {new: old for old, new in table.items()}
    if len(back) < len(table):
        raise ValueError('table must have a name of its own for each path')
    return back
