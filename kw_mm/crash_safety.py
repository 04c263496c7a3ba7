"""Makes files that mmengine writes in training survive a kill, a full disk and a power failure.

mmengine truncates checkpoints and the marker before it fills them, and deletes the old checkpoint
before it writes the new one. A process that is killed in between has lost what was there. mmengine
also resumes from whatever the marker names. ``kw_mm.compat`` applies this module.
"""
from __future__ import annotations

import functools
import io
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import mmengine.runner
import torch
from mmengine.config import Config
from mmengine.dist import broadcast_object_list, get_rank, is_main_process
from mmengine.fileio import FileClient, LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, checkpoint_hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from mmengine.runner import checkpoint as mmengine_checkpoint

from .checkpoint import check_checkpoint
from .files import replace_text, replacing
from .resuming import find_whole_checkpoint

# The key in the message hub, and so in the checkpoint, of the numbers of the checkpoints that it
# replaces.
_SUPERSEDED = 'superseded_ckpt_ids'


def apply() -> None:
    """Patches mmengine; may run again."""
    if hasattr(mmengine_checkpoint.save_checkpoint, 'writes_whole'):
        return
    save_checkpoint = _writing_whole(mmengine_checkpoint.save_checkpoint)
    for module in (mmengine_checkpoint, mmengine.runner, mmengine.runner.runner):
        module.save_checkpoint = save_checkpoint
    checkpoint_hook.open = _open  # writes the marker; hides the builtin there
    Config.dump = _dumping_whole(Config.dump)
    CheckpointHook._save_checkpoint_with_step = _removing_last(
        _noting_superseded(CheckpointHook._save_checkpoint_with_step))
    CheckpointHook._save_best_checkpoint = _removing_last(CheckpointHook._save_best_checkpoint)
    CheckpointHook.before_train = _removing_superseded(CheckpointHook.before_train)
    Runner.load_or_resume = _choosing(Runner.load_or_resume)


def choose_checkpoint_(runner: Runner, otherwise: str | None = None) -> bool:
    """Decides from which checkpoint of its folder a run resumes, and logs it.

    All processes of a distributed run must call it. They resume from the same file.

    Args:
        runner: Of the run. If it resumes from a named file or not at all, nothing is changed.
        otherwise: Checkpoint of the weights to start from if there is nothing to resume from.

    Returns:
        Whether it resumes.

    Raises:
        ValueError: If there are checkpoints, none can be resumed from, and not all of them are
            merely torn.
    """
    if not runner._resume or runner._load_from is not None:
        return bool(runner._resume)
    decided: list[Any] = [None]
    if get_rank() == 0:
        try:
            decided = [find_whole_checkpoint(runner.work_dir, _places(runner))]
        except (OSError, ValueError) as error:
            decided = [str(error)]
    broadcast_object_list(decided)
    if isinstance(decided[0], str):
        raise ValueError(decided[0])
    found = decided[0]
    text = found.describe()
    if found.path is None and otherwise:
        check_checkpoint(otherwise)
        text += f', with the weights of {otherwise}'
    print_log(text, 'current', logging.WARNING if found.passed else logging.INFO)
    runner._resume = found.path is not None
    runner._load_from = found.path or otherwise
    return runner._resume


def _choosing(original: Callable) -> Callable:
    @functools.wraps(original)
    def load_or_resume(self: Runner) -> None:
        if not self._has_loaded:
            choose_checkpoint_(self)
        original(self)

    return load_or_resume


def _places(runner: Runner) -> list[tuple[str, str]]:
    """The folders and names of checkpoints by the hooks that write them."""
    places = []
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            folder = runner.work_dir
            if hook.out_dir and hook.out_dir != runner.work_dir:
                folder = os.path.join(hook.out_dir, os.path.basename(os.path.abspath(folder)))
            places.append((folder, hook.filename_tmpl))
    return places


def _writing_whole(original: Callable) -> Callable:
    @functools.wraps(original)
    def save_checkpoint(checkpoint: dict, filename: str, file_client_args: dict | None = None,
                        backend_args: dict | None = None) -> None:
        if not _is_on_disk(filename, file_client_args, backend_args):
            original(checkpoint, filename, file_client_args, backend_args)
            return
        Path(filename).parent.mkdir(parents=True, exist_ok=True)
        with replacing(filename) as stream:
            torch.save(checkpoint, stream)

    save_checkpoint.writes_whole = True  # type: ignore[attr-defined]
    return save_checkpoint


def _is_on_disk(filename: str, file_client_args: dict | None, backend_args: dict | None) -> bool:
    if str(filename).startswith('pavi://') or (file_client_args and backend_args):
        return False
    backend = (FileClient.infer_client(file_client_args, filename) if file_client_args
               else get_file_backend(filename, backend_args=backend_args))
    return _is_local(backend)


def _is_local(backend: Any) -> bool:
    # The deprecated FileClient has the backend inside.
    return getattr(type(getattr(backend, 'client', backend)), 'put', None) is LocalBackend.put


@contextmanager
def _open(path: str, mode: str = 'r', *args: Any, **kwargs: Any) -> Iterator[Any]:
    """``open``, but a text file gets its name only once it is written completely."""
    if mode != 'w':
        with open(path, mode, *args, **kwargs) as stream:
            yield stream
        return
    text = io.StringIO()
    yield text
    replace_text(path, text.getvalue())


def _dumping_whole(original: Callable) -> Callable:
    @functools.wraps(original)
    def dump(self: Config, file: Any = None) -> Any:
        if file is None or not str(file).endswith('.py'):
            return original(self, file)
        return replace_text(file, self.pretty_text)

    return dump


class _RemovesLater:
    """A file backend that notes the files it should remove, and keeps them.

    Args:
        backend: Does everything else.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._noted: list[tuple[Callable, str, os.stat_result]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._noted.append((self._backend.remove, path, os.stat(path)))

    def rmtree(self, path: str) -> None:
        self._noted.append((self._backend.rmtree, path, os.stat(path)))

    def remove_now(self) -> None:
        for remove, path, noted in self._noted:
            # The new checkpoint may have the same name as the old one, e.g. as the best of an
            # epoch.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), noted):
                    remove(path)


def _removing_last(method: Callable) -> Callable:
    """Wraps a method of the hook: old checkpoints go once the new one and its marker are written.

    If writing fails, as on a full disk, they stay.
    """
    @functools.wraps(method)
    def save(self: CheckpointHook, *args: Any, **kwargs: Any) -> None:
        # Created when training begins, because a run that only validates should not have one.
        backend = getattr(self, 'file_backend', None)
        if backend is None or isinstance(backend, _RemovesLater) or not _is_local(backend):
            method(self, *args, **kwargs)
            return
        self.file_backend = later = _RemovesLater(backend)
        try:
            method(self, *args, **kwargs)
        finally:
            self.file_backend = backend
        later.remove_now()

    return save


def _noting_superseded(method: Callable) -> Callable:
    """Notes in a checkpoint which one it replaces: a kill may come before that is removed."""
    @functools.wraps(method)
    def save(self: CheckpointHook, runner: Runner, step: int, *args: Any, **kwargs: Any) -> None:
        kept = list(self.keep_ckpt_ids) if self.max_keep_ckpts > 0 else []
        if kept and kept[-1] != step:
            runner.message_hub.update_info(
                _SUPERSEDED, kept[:1] if len(kept) == self.max_keep_ckpts else [])
        method(self, runner, step, *args, **kwargs)

    return save


def _removing_superseded(method: Callable) -> Callable:
    @functools.wraps(method)
    def before_train(self: CheckpointHook, runner: Runner) -> None:
        method(self, runner)
        info = runner.message_hub.runtime_info
        if self.max_keep_ckpts <= 0 or _SUPERSEDED not in info or not is_main_process():
            return
        # Only numbers are noted, so that a checkpoint cannot have any other file removed.
        for step in set(map(int, info[_SUPERSEDED])) - set(self.keep_ckpt_ids):
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(step))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)

    return before_train
