"""Stores random states in checkpoints, so that a resumed run continues as if never stopped."""
from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import all_gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.runner import IterBasedTrainLoop

KEY = 'random_states'


class RandomStateHook(Hook):
    """Stores random states in checkpoints and protects them from validation.

    mmengine does not save them, so a resumed run draws other augmentations, dropout masks and so
    on. With this hook, each epoch starts with the states of python, numpy, torch and the device
    that the epoch before ended with, even if there was a validation, a checkpoint, or the end of
    the process and ``--resume`` in between. ``load_from`` does not set them. The states are stored
    as tensors and numbers, which ``torch.load(weights_only=True)`` reads.

    A run that was killed and resumed ends exactly like an uninterrupted one if

    * ``randomness = dict(seed=...)`` is set. If not, mmengine seeds the data loader before it reads
      the checkpoint; the hook then corrects the sampler's seed, but not that of the workers;
    * it is resumed from a checkpoint of the end of an epoch, or of any iteration if the loop is
      iteration-based (mmengine then reads the data again that were already used);
    * in an epoch-based loop, data are loaded with ``num_workers=0`` or by workers that start anew
      in each epoch (``persistent_workers=False``, which is not what most base configs have);
    * transforms, data set and model have no state that checkpoints lack, such as the image cache of
      ``CachedMosaic`` or gradients accumulated across the end of an epoch;
    * the operations themselves are deterministic (on a GPU: ``randomness`` with
      ``deterministic=True``) and the number of processes is the same.

    A checkpoint without states, or of another number of processes, is resumed as without this hook,
    with a warning in the log.
    """

    # After hooks that act at the end of an epoch or iteration, before CheckpointHook (VERY_LOW).
    priority = 'LOW'

    def __init__(self) -> None:
        # States of all processes while training pauses, None while it runs.
        self._paused: Any = None
        self._loaded: dict | None = None

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Keeps the states until training starts, when it is known whether this is a resume."""
        self._loaded = checkpoint.get(KEY) or {}

    def before_train(self, runner: Any) -> None:
        """Takes the states from the checkpoint that the run was resumed from."""
        loaded, self._loaded = self._loaded, None
        if loaded is None or runner.iter == 0:
            return
        states = loaded.get('processes', [])
        if len(states) != get_world_size():
            reason = (f'it has those of {len(states)} processes, this run {get_world_size()}'
                      if states else 'it has none')
            print_log('Random states are not resumed from the checkpoint, '
                      f'{reason}: the run goes on with other random numbers', 'current',
                      logging.WARNING)
            return
        self._paused = states
        sampler = _sampler(runner)
        if sampler is not None and loaded['sampler_seed'] is not None:
            sampler.seed = loaded['sampler_seed']

    def before_train_epoch(self, runner: Any) -> None:
        """Restores the states with which the last epoch ended."""
        loop = runner.train_loop
        if self._paused is None:
            return
        # The loop of the maintained fork can be told to skip nothing.
        skips = not getattr(loop, 'fast_forward_on_resume', False)
        if isinstance(loop, IterBasedTrainLoop) and skips:
            # The loop skips old data next, with all their random transforms.
            loop.dataloader_iterator = _Skipping(loop.dataloader_iterator, loop.iter,
                                                 self._put_back)
        else:
            self._put_back()

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Ends the pause."""
        self._paused = None

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Collects the states of all processes if a checkpoint is due."""
        # Not in each iteration, because it synchronises. A single process needs it only when
        # saving.
        if get_world_size() > 1 and any(_is_due(hook, runner) for hook in runner.hooks):
            self._pause()

    def after_train_epoch(self, runner: Any) -> None:
        """Keeps the states for the next epoch."""
        self._pause()

    def before_val(self, runner: Any) -> None:
        """Keeps the states during validation, which may come within an epoch."""
        if self._paused is None:
            self._pause()

    def after_val(self, runner: Any) -> None:
        """Restores the states that training had."""
        self._put_back()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Adds the states; only the main process calls this."""
        states = self._paused
        if states is None and get_world_size() > 1:
            print_log('A checkpoint at a moment of its own gets no random states: the other '
                      'processes were not asked for theirs', 'current', logging.WARNING)
            return
        sampler = _sampler(runner)
        checkpoint[KEY] = dict(processes=states or [get_random_state()],
                               sampler_seed=None if sampler is None else sampler.seed)

    def _pause(self) -> None:
        self._paused = all_gather_object(get_random_state())

    def _put_back(self) -> None:
        set_random_state(self._paused[get_rank()])


class _Skipping:
    """A data iterator that calls a function once ``num`` batches have been skipped."""

    def __init__(self, iterator: Any, num: int, then: Callable[[], None]) -> None:
        self.iterator = iterator
        self.left = num
        self.then = then

    def __next__(self) -> Any:
        if self.left == 0:
            self.then()
        self.left -= 1
        return next(self.iterator)

    def skip_iter(self, num: int) -> None:
        """Called by the maintained fork's loop, which would move the sampler alone.

        Then workers would start anew, and draw other augmentations than in a run that never
        stopped.
        """
        for _ in range(num):
            next(self)


def get_random_state() -> dict[str, Any]:
    """States of python's, numpy's, torch's and the device's global generators."""
    version, words, gauss = random.getstate()
    state: Any = np.random.get_state()
    name, keys, position, has_gauss, cached = state
    device = _device_generator()
    return dict(
        python=(version, torch.tensor(words, dtype=torch.int64), gauss),
        numpy=(name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
        torch=torch.get_rng_state(),
        device=None if device is None else device.get_rng_state())


def set_random_state(state: dict[str, Any]) -> None:
    """Sets what ``get_random_state`` returned; its tensors may lie on any device."""
    version, words, gauss = state['python']
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    device = _device_generator()
    if device is not None and state['device'] is not None:
        device.set_rng_state(state['device'].cpu())


def _device_generator() -> Any:
    """The module (``torch.cuda``, ...) with the generator of this process's device, or None."""
    module = getattr(torch, get_device(), None)
    return module if hasattr(module, 'get_rng_state') else None


def _sampler(runner: Any) -> Any:
    """The sampler that shuffles the training data, if it has a seed of its own."""
    sampler = getattr(runner.train_dataloader.batch_sampler, 'sampler', None)
    return sampler if isinstance(getattr(sampler, 'seed', None), int) else None


def _is_due(hook: Hook, runner: Any) -> bool:
    """Whether a hook is about to save a checkpoint after this iteration."""
    return isinstance(hook, CheckpointHook) and not hook.by_epoch and (
        hook.every_n_train_iters(runner, hook.interval, hook.save_begin)
        or hook.save_last and hook.is_last_train_iter(runner))
