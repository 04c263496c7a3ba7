"""Checkpoint files: checked before a run spends minutes on everything else, read, written."""
from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

# Since 2.6 the few classes in mmengine's own checkpoints can be allowed (``kw_mm.compat``); before,
# what reads nothing else refuses them. None is torch's default, which a variable of the
# environment can turn round.
_SAFELY = True if torch.__version__ >= (2, 6) else None


def check_checkpoint(path: str, resume: bool = False) -> dict | None:
    """Checks that a file is a checkpoint.

    Tensors of files in torch's current format are not read, so that it takes little time.

    Args:
        path: Of the checkpoint. Names with a scheme (``https://``, ``torchvision://``) are
            passed, for they would have to be downloaded.
        resume: Whether training is to be resumed from it, which takes more than weights.

    Returns:
        What is in it; None for names with a scheme.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut off, is no checkpoint, holds what ``torch.load`` refuses to build,
            or cannot be resumed from.
    """
    # Two letters at least: one is a drive.
    if re.match(r'\w[\w-]+:', path):
        return None
    checkpoint = _read(path, weights_only=_SAFELY)
    missing = {'state_dict', 'meta', 'message_hub'} - set(checkpoint)
    if resume and missing:
        raise ValueError(f'checkpoint {path!r} cannot be resumed from, it has no '
                         f'{sorted(missing)}; to start from its weights, set load_from')
    return checkpoint


def read_checkpoint(path: str, allowed: Sequence[type] = ()) -> dict:
    """Reads a checkpoint on the CPU, tensors and plain values alone.

    Before torch 2.6 files that hold more than that, such as mmengine's own with the logged
    history, are refused.

    Args:
        path: Of the file.
        allowed: Classes of which the file may hold objects as well. Before torch 2.5 there is no
            way to allow any.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut off, is no checkpoint or holds what is not allowed.
    """
    safe_globals = getattr(torch.serialization, 'safe_globals', lambda classes: nullcontext())
    with safe_globals(list(allowed)):
        return _read(path, weights_only=True)


def write_checkpoint(checkpoint: Mapping[str, Any], path: str, overwrite: bool = False) -> None:
    """Writes a checkpoint, all of it or none: an interrupted one leaves no file of that name.

    Args:
        checkpoint: What to write.
        path: Of the file. Folders that do not exist are made.
        overwrite: Whether to replace a file.

    Raises:
        FileExistsError: If there is one and it is not to be replaced.
        OSError: If it cannot be written.
    """
    file = Path(path).expanduser()
    check_destination(path, overwrite)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f'.{file.name}.{os.getpid()}.tmp')
    try:
        with unfinished.open('wb') as stream:
            torch.save(dict(checkpoint), stream)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def check_destination(path: str, overwrite: bool = False) -> None:
    """Checks that a file may be written, before the work is done that fills it.

    Raises:
        FileExistsError: If there is one and it is not to be replaced.
        IsADirectoryError: If it is a folder.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        raise IsADirectoryError(f'{path!r} must be a file to write, it is a folder')
    if file.exists() and not overwrite:
        raise FileExistsError(f'{path!r} exists already')


def _read(path: str, **kwargs: Any) -> dict:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f'checkpoint {path!r} does not exist')
    with file.open('rb') as stream:
        is_archive = stream.read(2) == b'PK'
    # The directory of an archive is its end; torch would say no more than "not found".
    if is_archive and not zipfile.is_zipfile(file):
        raise ValueError(f'checkpoint {path!r} is cut off: its writing was interrupted, or it was '
                         'not copied to the end')
    try:
        # Mapped, tensors are not read before they are used.
        checkpoint = torch.load(str(file), map_location='cpu', mmap=is_archive or None, **kwargs)
    except Exception as error:
        raise ValueError(f'checkpoint {path!r} {_reason(error)}') from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f'checkpoint {path!r} must hold a dict, got {type(checkpoint).__name__}')
    return checkpoint


def _reason(error: Exception) -> str:
    refused = re.search(r'Unsupported global: GLOBAL (\S+)', str(error))
    if refused:
        return (f'holds {refused[1]}, which torch.load refuses to build: a file can run code when '
                'more than tensors and plain values is loaded')
    if isinstance(error, ValueError):
        return f'is refused: {error}'
    # Not torch's own words, which advise to switch its protection off.
    return f'is cut off or no checkpoint ({type(error).__name__})'
