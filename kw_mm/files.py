"""Files that take the place of others: written whole or not at all, whatever ends their writer."""
from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# What a file is called while it is written: hidden, and so that nobody takes it for a checkpoint.
_SUFFIX = '.unfinished'
# Where a file system has no locks, only its age tells a dead writer's file from one in the making.
_ABANDONED_SECONDS = 24 * 3600


class NotWrittenError(OSError):
    """A file that could not be written. One that had its name before is as it was."""


@contextmanager
def replacing(path: str | os.PathLike, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content appears under a name once it is complete.

    The name stands for what it stood for before until the stream's content is on the disk, then
    for that. A process that is killed in between leaves an unfinished file beside it, which the
    next one that writes into the folder removes. Processes that write the same name at a time do
    not mix; the last wins. A symbolic link stays one, and permissions stay.

    Args:
        path: Of the file. Its folder must exist.
        durable: Whether to wait for the disk, so that the same holds when the power fails. It
            takes milliseconds, too long for each of thousands of files.

    Raises:
        NotWrittenError: If the disk is full, the folder cannot be written to, or the like.
    """
    target = Path(os.path.realpath(Path(path).expanduser()))
    if target.exists() and not target.is_file() and not target.is_dir():
        with open(target, 'wb') as device:  # or a pipe
            yield device
        return
    unfinished = None
    try:
        if durable:
            remove_unfinished(target.parent)
        if target.is_dir():
            raise IsADirectoryError(f'{str(path)!r} is a folder')
        stream: BinaryIO
        stream, unfinished = _open_unfinished(target)
        with stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
            if os.name == 'nt':  # which renames no open file
                stream.close()
            with suppress(OSError):
                shutil.copymode(target, unfinished)
            os.replace(unfinished, target)
        if durable:
            _sync_folder(target.parent)
    except BaseException as error:
        if unfinished is not None:
            with suppress(OSError):
                unfinished.unlink()
        # torch.save turns the error of a stream into one of its own, with the other as context.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, OSError):
            raise
        raise NotWrittenError(f'{str(path)!r} cannot be written: {cause.strerror or cause}; what '
                              'was there before is unchanged') from error


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, whole or not at all (``replacing``)."""
    with replacing(path) as stream:
        stream.write(text.encode())


def write_json(path: str | os.PathLike, value: Any, **options: Any) -> None:
    """Writes a JSON file, whole or not at all (``replacing``).

    Args:
        path: Of the file.
        value: What to write.
        options: Of ``json.dumps``.
    """
    replace_text(path, json.dumps(value, **options))


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds, None if there is none or it is torn."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(Path(path).read_text(encoding='utf-8'))


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left unfinished in a folder, and nothing that is in use."""
    for leftover in folder.glob(f'.*{_SUFFIX}'):
        # It may be gone meanwhile, someone else's, or open, which on Windows keeps it.
        with suppress(OSError):
            if fcntl is None or _is_abandoned(leftover):
                leftover.unlink()


def _open_unfinished(target: Path) -> tuple[BinaryIO, Path]:
    """A new file beside the target, locked for as long as it is open or its process lives."""
    while True:
        path = target.with_name(f'.{target.name}.{secrets.token_hex(4)}{_SUFFIX}')
        stream = open(path, 'xb')  # noqa: SIM115  (the caller closes it)
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(stream, fcntl.LOCK_EX)
        # Before it was locked, another process may have taken it for abandoned.
        if path.exists():
            return stream, path
        stream.close()


def _is_abandoned(path: Path) -> bool:
    with path.open('r+b') as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return time.time() - path.stat().st_mtime > _ABANDONED_SECONDS
        return True


def _sync_folder(folder: Path) -> None:
    """Puts the names in a folder on the disk, where the platform can."""
    if os.name == 'nt':
        return
    with suppress(OSError):  # not on every file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
