"""Renaming the keys of state dicts with two-way tables."""
from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

Value = TypeVar('Value')


def rename_keys(state_dict: Mapping[str, Value], table: Mapping[str, str]) -> dict[str, Value]:
    """Renames keys by their beginnings.

    Args:
        state_dict: What to rename.
        table: Paths of modules or parameters, and their new names. Of several paths that a key
            begins with, the longest is taken; other keys keep their names.

    Raises:
        ValueError: If two keys would become the same.
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
    """The table in the other direction.

    Raises:
        ValueError: If two entries have the same new name.
    """
    back = {new: old for old, new in table.items()}
    if len(back) < len(table):
        raise ValueError('table must have a name of its own for each path')
    return back
