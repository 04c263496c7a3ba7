"""Parts of a long check, each in a process of its own, within a time that is given for all.

A part that fails or hangs costs only itself: it is stopped when its share of the time is over, and
what it had written until then counts. What a part leaves of its share goes to those behind it.
"""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kw_mm.files import replace_text, write_json

from .tables import markdown_table

# How often a running part's findings are looked at, and how much of its log a report ends with.
POLL_SECONDS = 0.2
LOG_LINES = 12


@dataclass
class Part:
    """One part and what became of it.

    Attributes:
        name: Short, for files and options.
        title: One line on what it does.
        command: What runs it. It is told by ``KW_MM_FINDINGS`` where to write its findings, see
            ``Findings``.
        share: Of the time, in whatever unit the other parts' have.
        status: ``'waiting'``, ``'running'``, ``'done'``, ``'failed'``, ``'out of time'`` or
            ``'not started'``.
        seconds: That it took.
        log: The end of what it printed, where it failed.
        found: What it wrote.
    """

    name: str
    title: str
    command: Sequence[str]
    share: float = 1.0
    status: str = 'waiting'
    seconds: float = 0.0
    log: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)


class Findings:
    """What a part finds: tables and sentences, on the disk as soon as they are known."""

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = path or os.environ.get('KW_MM_FINDINGS')
        self.tables: dict[str, list[dict[str, str]]] = {}
        self.notes: list[str] = []

    def add(self, table: str, **row: Any) -> None:
        """Adds a row to a table, by the titles of its columns; numbers with four digits."""
        row = {title.replace('_', ' '): f'{value:.4g}' if isinstance(value, float) else str(value)
               for title, value in row.items()}
        print(f'{table}: {row}', flush=True)
        self.tables.setdefault(table, []).append(row)
        self._write()

    def note(self, text: str) -> None:
        """Adds a sentence."""
        print(text, flush=True)
        self.notes.append(text)
        self._write()

    def _write(self) -> None:
        if self.path:
            write_json(self.path, dict(tables=self.tables, notes=self.notes))


def run_parts(parts: Sequence[Part], out: Path, seconds: float, facts: Mapping[str, Any]) -> bool:
    """Runs parts one after the other; writes ``results.json`` and ``results.md`` as it goes.

    Args:
        parts: In the order of their worth.
        out: A folder, made if missing. Of each part it gets the log and the findings.
        seconds: For all of them.
        facts: What a reader must know, by name.

    Returns:
        Whether all ended well.
    """
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + seconds

    def write() -> None:
        write_json(out / 'results.json', dict(
            facts=dict(facts), parts={part.name: asdict(part) for part in parts}), indent=1)
        replace_text(out / 'results.md', markdown(parts, facts))

    write()
    for number, part in enumerate(parts):
        left = end - time.monotonic()
        limit = left * part.share / sum(p.share for p in parts[number:])
        if limit <= 0:
            part.status = 'not started'
        else:
            _run(part, out, limit, write)
        write()
        print(f'{part.name}: {part.status} after {part.seconds:.0f} s', flush=True)
    return all(part.status == 'done' for part in parts)


def _run(part: Part, out: Path, limit: float, write: Any) -> None:
    found, log = out / f'{part.name}.json', out / f'{part.name}.log'
    found.unlink(missing_ok=True)  # of a run before
    part.status, start = 'running', time.monotonic()
    print(f'{part.name}: {part.title}, at most {limit:.0f} s', flush=True)
    with log.open('w', encoding='utf-8') as stream:
        # A session of its own: what it starts is stopped with it.
        process = subprocess.Popen(
            list(part.command), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            env=dict(os.environ, KW_MM_FINDINGS=str(found), PYTHONUNBUFFERED='1'))
        seen = 0
        try:
            while process.poll() is None and time.monotonic() - start < limit:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_SECONDS)
                changed = found.stat().st_mtime_ns if found.exists() else 0
                if changed != seen:
                    seen, part.found = changed, json.loads(found.read_text(encoding='utf-8'))
                    write()
        finally:
            is_over = process.poll() is None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    part.seconds = time.monotonic() - start
    if found.exists():
        part.found = json.loads(found.read_text(encoding='utf-8'))
    part.status = 'out of time' if is_over else 'failed' if process.returncode else 'done'
    if part.status != 'done':
        part.log = log.read_text(encoding='utf-8', errors='replace').splitlines()[-LOG_LINES:]


def markdown(parts: Sequence[Part], facts: Mapping[str, Any]) -> str:
    """A report: what was found where, what became of each part, and its tables."""
    text = ['# Check on a GPU' if str(facts.get('device')).startswith('cuda') else
            f'# Check on {facts.get("device")}, in small',
            markdown_table([{'what': name, 'found': str(value)} for name, value in facts.items()]),
            markdown_table([{'part': part.name, 'what': part.title, 'status': part.status,
                             's': f'{part.seconds:.0f}'} for part in parts])]
    for part in parts:
        tables, notes = part.found.get('tables', {}), part.found.get('notes', [])
        if not (tables or notes or part.log):
            continue
        text += [f'## {part.name}: {part.title}', *notes]
        text += [f'### {title}\n\n{markdown_table(rows)}' for title, rows in tables.items()]
        if part.log:
            text.append('\n'.join(['It ended with:', '', *(f'    {line}' for line in part.log)]))
    return '\n\n'.join(text) + '\n'
