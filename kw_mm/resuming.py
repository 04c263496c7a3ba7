"""Which checkpoint a run goes on from: the newest in its folder that is whole."""
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
# What mmengine's CheckpointHook calls its files, those of the best ones apart: these lack the
# optimizer.
TEMPLATES = ('epoch_{}.pth', 'iter_{}.pth')


@dataclass
class Found:
    """A checkpoint to resume from, and what there is to say of it.

    Attributes:
        folder: Where was looked.
        path: Of the newest whole checkpoint; None if there is none.
        passed: Why what is newer, or was named, is not taken, each a clause.
        is_lost: Whether one of those that were passed is something else than torn.
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

    mmengine's marker, the file ``last_checkpoint``, names the checkpoint that was written last,
    but it can be empty or torn, and what it names deleted or torn. What it names is taken if that
    is whole, unless a later checkpoint of the run is there too, whose marker was never written.
    Otherwise all checkpoints in the folder are considered. Newer is what was written later by the
    time inside the file, not its number: an earlier, longer run may have left its own.

    Args:
        folder: The work directory of the run.
        places: Where else checkpoints may lie: folders, each with the template of the names.

    Returns:
        What was found, or that there is nothing.

    Raises:
        ValueError: If there are checkpoints, none of them whole, and not all of them are torn. To
            start from the beginning would be to write over them.
    """
    found = Found(str(folder))
    marked = _read_marker(found)
    if marked and has_scheme(marked):  # remote, where it cannot be checked
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
        # A failing power supply can leave zeros.
        text = marker.read_bytes().decode(errors='replace').strip('\0 \t\r\n')
    except OSError:
        return None
    if not text:
        found.passed.append(f'{MARKER} is empty')
        return None
    # Relative to where that run was started; and the folder may have been moved since.
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
    """Takes the newest whole one, if any is newer; those that had to be passed are noted."""
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
    # By the time inside; copying a file can give it a new one.
    meta = (check_checkpoint(path) or {}).get('meta')
    meta = meta if isinstance(meta, dict) else {}
    stamp = meta.get('time') or time.strftime(
        '%Y%m%d_%H%M%S', time.localtime(os.path.getmtime(path)))
    iterations = meta.get('iter')
    return str(stamp), iterations if isinstance(iterations, int) else 0
