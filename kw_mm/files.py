"""Replaces files completely or not at all, even if the writing process is killed."""
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

# The name of a file while it is written. It is hidden and does not look like a checkpoint.
_SUFFIX = '.unfinished'
# Seconds. On file systems without locks, only its age tells whether an unfinished file is
# abandoned.
_ABANDONED_SECONDS = 24 * 3600


class NotWrittenError(OSError):
    """A file could not be written. If there was one of that name before, it is unchanged."""


@contextmanager
def replacing(path: str | os.PathLike, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content appears under its name once it is complete.

    The old file stays until the new content is on the disk. A process that is killed before leaves
    an unfinished file beside it, which the next process that writes into the folder removes. If
    several processes write the same file, the last one wins, and their contents do not mix.
    Symbolic links and permissions are kept.

    Args:
        path: Of the file. Its folder must exist.
        durable: Whether to wait for the disk, so that this also holds if the power fails. It takes
            milliseconds, too long if there are thousands of files.

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
            if os.name == 'nt':  # which cannot rename an open file
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
        # torch.save raises an error of its own, which has the stream's error as its context.
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
    """The content of a JSON file; None if there is none or it is torn."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(Path(path).read_text(encoding='utf-8'))


def remove_unfinished(folder: Path) -> None:
    """Removes files that killed processes left unfinished in a folder, but none that is in use."""
    for leftover in folder.glob(f'.*{_SUFFIX}'):
        # It may be gone by now, belong to another user, or be open, which prevents removal on
        # Windows.
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
        # Between creating and locking it, another process may have removed it as abandoned.
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
    """Makes the names in a folder durable, on platforms that can."""
    if os.name == 'nt':
        return
    with suppress(OSError):  # not on every file system
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
