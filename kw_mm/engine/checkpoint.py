"""Checks of checkpoint files, made before a run spends minutes on everything else."""
from __future__ import annotations

import re
import zipfile
from pathlib import Path
from typing import Any

import torch


def check_checkpoint(path: str, resume: bool = False) -> None:
    """Checks that a file is a checkpoint.

    Tensors of files in torch's current format are not read, so that it takes little time.

    Args:
        path: Of the checkpoint. Names with a scheme (``https://``, ``torchvision://``) are
            passed, for they would have to be downloaded.
        resume: Whether training is to be resumed from it, which takes more than weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is cut off, is no checkpoint, holds what ``torch.load`` refuses to build,
            or cannot be resumed from.
    """
    # Two letters at least: one is a drive.
    if re.match(r'\w[\w-]+:', path):
        return
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f'checkpoint {path!r} does not exist')
    checkpoint = _read(file, path)
    if not isinstance(checkpoint, dict):
        raise ValueError(f'checkpoint {path!r} must hold a dict, got {type(checkpoint).__name__}')
    missing = {'state_dict', 'meta', 'message_hub'} - set(checkpoint)
    if resume and missing:
        raise ValueError(f'checkpoint {path!r} cannot be resumed from, it has no '
                         f'{sorted(missing)}; to start from its weights, set load_from')


def _read(file: Path, path: str) -> Any:
    with file.open('rb') as stream:
        is_archive = stream.read(2) == b'PK'
    # The directory of an archive is its end; torch would say no more than "not found".
    if is_archive and not zipfile.is_zipfile(file):
        raise ValueError(f'checkpoint {path!r} is cut off: its writing was interrupted, or it was '
                         'not copied to the end')
    try:
        # Not weights_only: what torch's default allows is what mmengine will get.
        return torch.load(str(file), map_location='cpu', mmap=is_archive or None)
    except Exception as error:
        raise ValueError(f'checkpoint {path!r} {_reason(error)}') from error


def _reason(error: Exception) -> str:
    refused = re.search(r'Unsupported global: GLOBAL (\S+)', str(error))
    if refused:
        return (f'holds {refused[1]}, which torch.load refuses to build: a file can run code when '
                'more than tensors and plain values is loaded')
    if isinstance(error, ValueError):
        return f'is refused: {error}'
    # Not torch's own words, which advise to switch its protection off.
    return f'is cut off or no checkpoint ({type(error).__name__})'
