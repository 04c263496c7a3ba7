"""Reads what a run has logged."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_scalars(work_dir: Path) -> list[dict[str, Any]]:
    """The logged lines of a run, in order; of steps that were repeated after an interruption, the
    last."""
    lines: dict[tuple[bool, Any], dict[str, Any]] = {}
    for path in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for text in path.read_text().splitlines():
            try:
                line = json.loads(text)
            except ValueError:
                continue  # torn by a kill
            lines['loss' in line, line.get('step')] = line
    return list(lines.values())
