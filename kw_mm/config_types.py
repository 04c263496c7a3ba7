"""What both kinds of config files have in common, those of dicts and those in pure Python."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def type_name(cfg: Any) -> str:
    """The bare name of what a dict of a config builds; empty if it has no type.

    Configs in pure Python have the class itself, others a name, perhaps with the toolbox before
    a dot.
    """
    kind = cfg.get('type') if isinstance(cfg, Mapping) else None
    return '' if kind is None else getattr(kind, '__name__', str(kind)).rpartition('.')[2]
