"""Kills runs at random times and while they write, and checks that resumed runs end the same.

Each run is a fork of this process, which saves the seconds that imports take. So a POSIX system is
needed, and training runs on one thread.
"""
from __future__ import annotations

import builtins
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoint import check_checkpoint
from ..resuming import find_whole_checkpoint

# At most so many kills per run. With several, some hit runs that resume after a kill.
MAX_KILLS = 4
# Entries of a checkpoint that contain the time of day.
UNLIKE = ('meta', 'message_hub')


class Moment(NamedTuple):
    """A moment in writing a file: the stage, and how often it has been reached for this file."""

    stage: str
    file: str
    number: int


@dataclass
class Outcome:
    """The result of a campaign."""

    random: int = 0
    writing: dict[str, int] = field(default_factory=dict)
    survivors: int = 0
    refused: list[str] = field(default_factory=list)
    different: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        return self.random + sum(self.writing.values())

    @property
    def is_clean(self) -> bool:
        return not (self.refused or self.different or self.left)


def run_campaign(train: Callable[[str], None], folder: str, kills: int, seed: int = 0,
                 report: Callable[[str], None] = print) -> Outcome:
    """Kills and resumes runs, and compares their last checkpoints with that of an undisturbed run.

    Half of the kills come at random times, the others while the run writes a file in its folder:
    before, in the middle of and after each write, before and after the file gets its name, and
    before and after an old file is removed.

    Args:
        train: Trains in the folder that it is given, and resumes what it finds there. It must use
            the same random numbers each time, or all runs will differ.
        folder: Where to write; it must not exist. Runs without differences are removed.
        kills: How many.
        seed: Seed of the times and moments of kills.
        report: Is called with a line for every run that has ended.

    Raises:
        RuntimeError: If the undisturbed run fails or leaves no checkpoint.
    """
    torch.set_num_threads(1)  # also in the children, because threads do not survive a fork
    draw = random.Random(seed)
    root = Path(folder)
    root.mkdir(parents=True)
    start = time.monotonic()
    status = _run(train, root / 'whole', record=root / 'moments.json')
    seconds = time.monotonic() - start
    whole = find_whole_checkpoint(str(root / 'whole')).path
    if status != 0 or whole is None:
        raise RuntimeError(f'the run that was left alone failed; see {root / "whole.log"}')
    expected: Any = check_checkpoint(whole)
    groups: dict[tuple[str, str], int] = {}
    for stage, file, count in json.loads((root / 'moments.json').read_text()):
        groups[stage, file] = max(count, groups.get((stage, file), 0))
    report(f'left alone: {seconds:.1f} s, {sum(groups.values())} moments of writing')

    outcome = Outcome()
    while outcome.kills < kills:
        work_dir = root / f'killed_{outcome.survivors + len(outcome.refused)}'
        left = min(draw.randint(1, MAX_KILLS), kills - outcome.kills)
        while True:
            delay = moment = None
            if left and draw.random() < 0.5:
                delay = draw.uniform(0, seconds)
            elif left:
                stage, file = draw.choice(sorted(groups))
                moment = Moment(stage, file, draw.randint(1, groups[stage, file]))
            status = _run(train, work_dir, delay, moment)
            if status != -signal.SIGKILL:
                break  # also if it ended before that time or moment
            left -= 1
            if moment:
                key = f'{moment.stage} {moment.file}'
                outcome.writing[key] = outcome.writing.get(key, 0) + 1
            else:
                outcome.random += 1
        _judge(outcome, work_dir, status, expected, report)
    return outcome


def _judge(outcome: Outcome, work_dir: Path, status: int, expected: dict,
           report: Callable[[str], None]) -> None:
    found = find_whole_checkpoint(str(work_dir)).path if status == 0 else None
    if found is None:
        outcome.refused.append(str(work_dir))
        report(f'{work_dir.name}: REFUSED, see {work_dir}.log')
        return
    outcome.survivors += 1
    leftovers = [str(path) for path in work_dir.glob('.*')]
    outcome.left += leftovers
    survivor: Any = check_checkpoint(found)
    differing = differences(expected, survivor)
    if differing:
        outcome.different.append(str(work_dir))
        report(f'{work_dir.name}: DIFFERENT: {", ".join(differing[:5])}')
    elif not leftovers:
        report(f'{work_dir.name}: the same; {outcome.kills} kills so far')
        shutil.rmtree(work_dir)
        Path(f'{work_dir}.log').unlink()


def differences(expected: dict, found: dict) -> list[str]:
    """The names of entries that are not the same, bit by bit, in two checkpoints."""
    values, others = ({name: value for name, value in _flat(checkpoint)
                       if name.split('.')[0] not in UNLIKE} for checkpoint in (expected, found))
    return [name for name in {**values, **others}
            if name not in values or name not in others
            or not _same(values[name], others[name])]


def _flat(value: Any, name: str = '') -> Any:
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, child in items:
            yield from _flat(child, f'{name}.{key}' if name else str(key))
    else:
        yield name, value


def _same(first: Any, second: Any) -> bool:
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return type(first) is type(second) and first == second
    return first.dtype == second.dtype and first.shape == second.shape and torch.equal(
        *(value.contiguous().flatten().view(torch.uint8) for value in (first, second)))


def _run(train: Callable[[str], None], work_dir: Path, delay: float | None = None,
         moment: Moment | None = None, record: Path | None = None) -> int:
    """Trains in a child; returns its exit status, negative for the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setsid()
            log = open(f'{work_dir}.log', 'a', buffering=1)  # noqa: SIM115  (to the end)
            sys.stdout = sys.stderr = log
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            watch = _Watch(work_dir, moment)
            train(str(work_dir))
            if record:
                watch.stop()
                record.write_text(json.dumps(watch.passed))
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    end = time.monotonic() + delay if delay is not None else None
    while True:
        pid, status = os.waitpid(child, os.WNOHANG if end else 0)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if end is not None and time.monotonic() >= end:
            os.killpg(child, signal.SIGKILL)
            end = None
        else:
            time.sleep(0.002)


class _Watch:
    """Counts the stages of writing files in a folder, and kills this process at a given one."""

    def __init__(self, folder: Path, moment: Moment | None) -> None:
        self.folder = os.path.abspath(folder)
        self.moment = moment
        self.passed: list[Moment] = []
        self.counts: dict[tuple[str, str], int] = {}
        self.is_on = True
        self.file = ''  # the one that is being written
        self.open, replace, fsync = builtins.open, os.replace, os.fsync
        builtins.open = self.watched_open  # type: ignore[assignment]
        os.replace = self.around(replace, 'naming', 'named', 1)
        os.fsync = self.around(fsync, 'syncing', 'synced')
        os.unlink = self.around(os.unlink, 'removing', 'removed', 0)
        os.remove = self.around(os.remove, 'removing', 'removed', 0)

    def stop(self) -> None:
        self.is_on = False

    def concerns(self, path: Any) -> bool:
        return (self.is_on and isinstance(path, (str, os.PathLike))
                and os.path.dirname(os.path.abspath(path)) == self.folder)

    def pass_(self, stage: str, path: Any = None) -> None:
        if path is not None:
            name = re.sub(r'^\.(.*)\.[0-9a-f]+\.unfinished$', r'\1', os.path.basename(path))
            self.file = re.sub(r'\d+', '#', name)
        key = stage, self.file
        self.counts[key] = self.counts.get(key, 0) + 1
        moment = Moment(*key, self.counts[key])
        self.passed.append(moment)
        if moment == self.moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(self, function: Callable, before: str, after: str,
               path: int | None = None) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            name = None if path is None else args[path]
            if not self.is_on or name is not None and not self.concerns(name):
                return function(*args, **kwargs)
            self.pass_(before, name)
            result = function(*args, **kwargs)
            self.pass_(after, name)
            return result

        return watched

    def watched_open(self, path: Any, mode: str = 'r', *args: Any, **kwargs: Any) -> Any:
        if not set(mode) & set('wx') or not self.concerns(path):
            return self.open(path, mode, *args, **kwargs)
        self.pass_('opening', path)
        stream = self.open(path, mode, *args, **kwargs)
        self.pass_('opened', path)
        return _WatchedStream(stream, self)


class _WatchedStream:
    """A stream that splits each write into two."""

    def __init__(self, stream: Any, watch: _Watch) -> None:
        self._stream = stream
        self._watch = watch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _WatchedStream:
        return self

    def __exit__(self, *args: Any) -> None:
        self._stream.close()

    def write(self, data: Any) -> int:
        data = data if isinstance(data, str) else bytes(data)
        self._watch.pass_('writing')
        self._stream.write(data[:len(data) // 2])
        self._stream.flush()
        self._watch.pass_('half written')
        self._stream.write(data[len(data) // 2:])
        self._stream.flush()
        return len(data)
