"""Finds the checkpoint that a run resumes from: the newest whole one in its folder."""
from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoint import TornCheckpointError, check_checkpoint, has_scheme

MARKER = 'last_checkpoint'
# How mmengine's CheckpointHook names its files. Those of the best checkpoints are not here, because
# they lack the optimizer.
TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth')


@dataclass
class Found:
    """A checkpoint to resume from, and why others were not taken.

    Attributes:
        folder: The work directory that was searched.
        path: Of the newest whole checkpoint; None if there is none.
        passed: For each newer or named checkpoint that was not taken, a clause that says why.
        is_lost: Whether one of these has another fault than being torn.
    """

    folder: str
    path: str | None = None
    passed: list[str] = field(default_factory=list)
    is_lost: bool = False

    def describe(self) -> str:
        """One sentence for the log."""
        because = ''.join(f'; {reason}' for reason in self.passed)
        if self.path is None:
            return f'Nothing to resume from in {self.folder}{because}: training starts from the ' \
                   'beginning'
        return f'Resuming from {self.path}, the newest whole checkpoint{because}'


def find_whole_checkpoint(folder: str, places: Sequence[tuple[str, str]] = ()) -> Found:
    """Finds the newest whole checkpoint of a run, whatever its marker holds.

    mmengine's marker, the file ``last_checkpoint``, names the checkpoint that was written last. But
    the marker can be empty or torn, and the file it names deleted or torn. That file is taken if it
    is whole, unless the run has written a later checkpoint and was killed before it wrote the
    marker. Otherwise all checkpoints in the folder are considered. The time inside a file tells
    which is newest, not the number in its name, because an earlier, longer run may have left higher
    numbers.

    Args:
        folder: The work directory of the run.
        places: Other folders with checkpoints, each with the template of their names.

    Returns:
        What was found, or that there is nothing.

    Raises:
        ValueError: If there are checkpoints, none can be resumed from, and not all of them are
            torn. A fresh start would overwrite them.
    """
    found = Found(str(folder))
    marked = _read_marker(found)
    if marked and has_scheme(marked):  # remote files cannot be checked
        found.path = marked
        return found
    places = [(folder, template) for template in TEMPLATES] + list(places)
    if marked:
        places += [(os.path.dirname(marked), template) for _, template in places]
        _take_newest(found, [marked])
    candidates: dict[str, Any] = _list(places)
    if marked:
        _, template, number = candidates.pop(os.path.realpath(marked), (marked, None, 0))
        later = [path for path, *kind in candidates.values()
                 if kind[0] == template and kind[1] > number]
    if found.path is None:
        _take_newest(found, [path for path, *_ in candidates.values()])
    else:
        _take_newest(found, later, than=_written(found.path))
    if found.path is None and found.is_lost:
        raise ValueError(
            f'nothing in {str(folder)!r} can be resumed from: {"; ".join(found.passed)}. Name a '
            'checkpoint to resume from; to start from the beginning, move these away')
    return found


def _read_marker(found: Found) -> str | None:
    """The path in the marker of a folder, if there is such a file."""
    marker = Path(found.folder, MARKER)
    try:
        # After a power failure a file may consist of zeros.
        text = marker.read_bytes().decode(errors='replace').strip('\0 \t\r\n')
    except OSError:
        return None
    if not text:
        found.passed.append(f'{MARKER} is empty')
        return None
    # The path is relative to the folder in which that run was started, and may have changed since.
    for path in (text, os.path.join(found.folder, os.path.basename(text))):
        if has_scheme(path) or os.path.isfile(path):
            return path
    found.passed.append(f'{MARKER} names {text!r}, which is no file')
    return None


def _list(places: Iterable[tuple[str, str]]) -> dict[str, tuple[str, str, int]]:
    """Paths, templates and numbers of the checkpoints in folders, each once."""
    listed: dict[str, tuple[str, str, int]] = {}
    for folder, template in dict.fromkeys(places):
        pattern = re.compile(re.escape(template).replace(r'\{\}', r'(\d+)'))
        names = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
        for name in names:
            match = pattern.fullmatch(name)
            if match and match.groups():
                path = os.path.join(folder, name)
                listed.setdefault(os.path.realpath(path), (path, template, int(match[1])))
    return listed


def _take_newest(found: Found, paths: list[str], than: tuple[str, int] = ('', -1)) -> None:
    """Takes the newest whole checkpoint that is newer than ``than``, and notes torn ones."""
    ages = {}
    for path in paths:
        try:
            ages[path] = _written(path)
        except (OSError, ValueError) as error:
            _pass(found, error)
    newer = [path for path in ages if ages[path] > than]
    for path in sorted(newer, key=ages.__getitem__, reverse=True):
        try:
            check_checkpoint(path, resume=True)
        except (OSError, ValueError) as error:
            _pass(found, error)
        else:
            found.path = path
            return


def _pass(found: Found, error: Exception) -> None:
    found.passed.append(str(error))
    found.is_lost |= not isinstance(error, TornCheckpointError)


def _written(path: str) -> tuple[str, int]:
    """When a checkpoint was written, and after how many iterations."""
    # From the time inside the file, because copying can change the file's own time.
    meta = (check_checkpoint(path) or {}).get('meta')
    meta = meta if isinstance(meta, dict) else {}
    stamp = meta.get('time') or time.strftime(
        '%Y%m%d_%H%M%S', time.localtime(os.path.getmtime(path)))
    iterations = meta.get('iter')
    return str(stamp), iterations if isinstance(iterations, int) else 0
