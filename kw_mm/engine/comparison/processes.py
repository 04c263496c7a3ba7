"""Trains and tests in processes of their own, one for each."""
from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...resuming import find_whole_checkpoint
from ..local_training import ENVIRONMENT

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class LocalTrainer:
    """Trains and tests with the tools of this checkout.

    Args:
        tools: The folder of ``train.py`` and ``test.py``.
        threads: Of each process.
        lock: A file that processes hold open, see ``lock_folder``.
    """

    def __init__(self, tools: Path, threads: int, lock: int | None = None) -> None:
        self.tools = tools
        self.environment = {**ENVIRONMENT, 'OMP_NUM_THREADS': str(threads), **os.environ}
        self.lock = lock

    def train(self, config: str, work_dir: Path, changes: Mapping[str, Any]
              ) -> tuple[str, int | None]:
        peak = self._run(work_dir / 'train.log', 'train.py', config, '--work-dir', str(work_dir),
                         '--resume', '--skip-data-check', '--cfg-options',
                         *(f'{name}={value}' for name, value in changes.items()))
        found = find_whole_checkpoint(str(work_dir)).path
        if found is None:
            raise RuntimeError(f'the training left no checkpoint in {work_dir}')
        return found, peak

    def test(self, config: str, checkpoint: str, work_dir: Path) -> dict[str, float]:
        work_dir.mkdir(parents=True, exist_ok=True)
        self._run(work_dir / 'test.log', 'test.py', config, checkpoint, '--work-dir',
                  str(work_dir), '--skip-data-check')
        # The logger hook writes the metrics of a test into a file with the name of its folder.
        path = max(path for path in work_dir.glob('*/*.json') if path.stem == path.parent.name)
        metrics = {name: float(value) for name, value in json.loads(path.read_text()).items()
                   if isinstance(value, (int, float)) and math.isfinite(value)
                   and not name.endswith('time')}
        if not metrics:
            raise RuntimeError(f'the test of {checkpoint} gave no numbers, see {path}')
        return metrics

    def _run(self, log: Path, tool: str, *arguments: str) -> int | None:
        """Runs a tool and returns the peak of its memory in bytes, if the system tells it."""
        command = [sys.executable, str(self.tools / tool), *arguments]
        with log.open('ab') as output, subprocess.Popen(
                command, env=self.environment, stdout=output, stderr=output,
                pass_fds=() if self.lock is None else (self.lock,)) as process:
            peak = None
            if hasattr(os, 'wait4'):
                _, status, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(status)
                peak = usage.ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
            else:
                process.wait()
        if process.returncode:
            raise RuntimeError(_last_error(log) or f'{tool} ended with {process.returncode}, '
                               f'see {log}')
        return peak


def _last_error(log: Path) -> str | None:
    lines = [line for line in log.read_text(errors='replace').splitlines()
             if re.match(r'[\w.]*(Error|Exception|error|Killed|Interrupt)\b.*: ', line)]
    return f'{lines[-1]} (see {log})' if lines else None


@contextlib.contextmanager
def lock_folder(folder: Path, report: Callable[[str], None] = print) -> Iterator[int | None]:
    """Keeps two calls from training in one folder.

    A process that is killed leaves its children behind, and these hold the lock as well. So who
    comes later waits until they are done.

    Returns:
        The open file, for children to inherit; None where files cannot be locked.
    """
    if fcntl is None:
        yield None
        return
    with (folder / '.lock').open('w') as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f'waiting for another call, or for a training that it left, to end in {folder}')
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()
