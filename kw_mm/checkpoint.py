"""Checks, reads and writes checkpoint files."""
from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import unpickling
from .files import replacing


class TornCheckpointError(ValueError):
    """A checkpoint of which a part is missing or damaged."""


def check_checkpoint(path: str, resume: bool = False) -> dict | None:
    """Checks that a file is a checkpoint. No file can run code here, whatever the torch version.

    To save time, the tensors in files of torch's current format are not read. If training is to be
    resumed, every byte is compared with the checksums in the file, because torch would load a
    damaged file without an error.

    Args:
        path: Of the checkpoint. Names with a scheme (``https://``, ``torchvision://``) are not
            checked, because that would take a download.
        resume: Whether training is to be resumed from it, which takes more than weights.

    Returns:
        What is in it; None for names with a scheme.

    Raises:
        FileNotFoundError: If there is no such file.
        TornCheckpointError: If it is cut off, damaged or no checkpoint.
        ValueError: If it contains objects that ``torch.load`` refuses to build, or cannot be
            resumed from.
    """
    if has_scheme(path):
        return None
    checkpoint = _read(path, every_byte=resume)
    missing = {'state_dict', 'meta', 'message_hub'} - set(checkpoint)
    if resume and missing:
        raise ValueError(f'checkpoint {path!r} cannot be resumed from, it has no '
                         f'{sorted(missing)}; to start from its weights, set load_from')
    return checkpoint


def has_scheme(path: str) -> bool:
    """Whether a name is that of something remote (``https://``, ``s3://``, ``torchvision://``)."""
    # A scheme has at least two letters; a single one is a drive on Windows.
    return re.match(r'\w[\w-]+:', path) is not None


def read_checkpoint(path: str, allowed: Sequence[type] = ()) -> dict:
    """Reads a checkpoint on the CPU: tensors, plain values and what ``kw_mm.compat`` allows.

    Args:
        path: Of the file.
        allowed: Further classes whose objects the file may contain.

    Raises:
        FileNotFoundError: If there is no such file.
        TornCheckpointError: If it is cut off or no checkpoint.
        ValueError: If it contains objects that are not allowed.
    """
    if not unpickling.IS_NEEDED:
        with torch.serialization.safe_globals(list(allowed)):
            return _read(path)
    names = {f'{kind.__module__}.{kind.__qualname__}': kind for kind in allowed}
    with unpickling.allowing(names):
        return _read(path)


def write_checkpoint(checkpoint: Mapping[str, Any], path: str, overwrite: bool = False) -> None:
    """Writes a checkpoint. If that is interrupted, no file of that name appears.

    Args:
        checkpoint: What to write.
        path: Of the file. Folders that do not exist are made.
        overwrite: Whether to replace a file.

    Raises:
        FileExistsError: If there is one and it is not to be replaced.
        OSError: If it cannot be written.
    """
    check_destination(path, overwrite)
    Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        torch.save(dict(checkpoint), stream)


def check_destination(path: str, overwrite: bool = False) -> None:
    """Checks that a file may be written, before time is spent on its content.

    Raises:
        FileExistsError: If there is one and it is not to be replaced.
        IsADirectoryError: If it is a folder.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise IsADirectoryError(f'{path!r} must be a file to write, it is a folder')
    if file.exists() and not overwrite:
        raise FileExistsError(f'{path!r} exists already')


def _read(path: str, every_byte: bool = False) -> dict:
    file = Path(path).expanduser()
    if file.is_dir():
        raise ValueError(f'checkpoint {path!r} must be a file, it is a folder')
    if not file.is_file():
        raise FileNotFoundError(f'checkpoint {path!r} does not exist')
    with file.open('rb') as stream:
        is_archive = stream.read(2) == b'PK'
    if is_archive:
        _check_archive(path, file, every_byte)
    safely: dict[str, Any] = (
        dict(weights_only=False, pickle_module=unpickling) if unpickling.IS_NEEDED else
        dict(weights_only=True))
    try:
        # With mmap, tensors are read when they are used.
        checkpoint = torch.load(str(file), map_location='cpu', mmap=is_archive or None, **safely)
    except Exception as error:
        raise _refusal(path, error) from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'checkpoint {path!r} must hold a dict, got {type(checkpoint).__name__}')
    return checkpoint


def _check_archive(path: str, file: Path, every_byte: bool) -> None:
    """Checks what torch does not: it overlooks damage, and says little about torn files."""
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
            # torch has a setting to write no checksums.
            damaged = every_byte and any(r.CRC for r in records) and archive.testzip()
    except (zipfile.BadZipFile, EOFError) as error:
        # The directory of an archive is at its end, so a torn file has none.
        raise TornCheckpointError(f'checkpoint {path!r} is cut off: its writing was interrupted, '
                                  'or it was not copied to the end') from error
    if damaged:
        raise TornCheckpointError(f'checkpoint {path!r} is damaged: {damaged} in it is not what '
                                  'was written')
    if any(record.filename.endswith('/constants.pkl') for record in records):
        raise ValueError(f'checkpoint {path!r} is a TorchScript program, no checkpoint')


def _refusal(path: str, error: Exception) -> ValueError:
    text = str(error)
    name = re.search(r'nsupported (?:global: )?GLOBAL (\S+)', text)
    if name or re.search('unrecognized function|Can only|Unsupported (use|filling|persist)', text):
        what = name[1] if name else 'calls'
        return ValueError(
            f'checkpoint {path!r} holds {what}, which torch.load refuses to build: a file can run '
            'code when more than tensors and plain values is loaded')
    if isinstance(error, ValueError):
        return ValueError(f'checkpoint {path!r} is refused: {error}')
    # Torch's own message would advise to switch its protection off.
    return TornCheckpointError(
        f'checkpoint {path!r} is cut off or no checkpoint ({type(error).__name__})')
