"""Temperature annealing: from the initial assignment of cells to the learned attention."""
from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

from mmengine.dataset import InfiniteSampler
from mmengine.hooks import Hook
from mmengine.logging import print_log
from torch import nn
from torch.utils.data import DataLoader

from ...layers import set_temperature


class KWTemperatureHook(Hook):
    """Anneals the temperature of every KW layer linearly while the runner trains.

    At data-loader iteration i, counted from 0 over the whole run (method, section 3)::

        tau = start + (end - start) * min(1, (i + 1) / T)

    With the defaults that is ``max(0, 1 - (i + 1) / T)``. i is the runner's own counter, in which
    every step of a gradient accumulation counts, so resuming needs no state. tau is set before each
    training iteration, also in EMA copies, and is logged as ``tau``. Validation during training
    uses the current value. Stand-alone validation and testing, and training without the hook, run
    at 0, the value of every newly built model.

    Args:
        epochs: Length T of the schedule in epochs of the training data loader. If the loader
            samples without end, an epoch is as many batches as cover the data set.
        iters: Length T in iterations, instead of ``epochs``.
        start: Temperature before the first iteration, in [0, 1].
        end: Temperature from iteration T - 1 on, in [0, 1].

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If not exactly one of ``epochs`` and ``iters`` is given, if a value is out of
            range or, when training starts, if the model has no KW layer.
    """

    def __init__(self, epochs: int | None = None, iters: int | None = None, start: float = 1.0,
                 end: float = 0.0) -> None:
        if (epochs is None) == (iters is None):
            raise ValueError('exactly one of epochs and iters must be given, '
                             f'got epochs={epochs!r}, iters={iters!r}')
        for name, value in (('epochs', epochs), ('iters', iters)):
            if value is not None:
                _check_length(name, value)
        _check_temperature('start', start)
        _check_temperature('end', end)
        self.epochs = epochs
        self.iters = iters
        self.start = start
        self.end = end

    def before_train(self, runner: Any) -> None:
        """Finds the length of the schedule, and the place in it of a resumed run."""
        self._length = self.iters or (self.epochs or 0) * _iters_per_epoch(
            runner.train_dataloader)
        # The value of the last iteration, so that it is right if validation comes first.
        if not self._set(runner, runner.iter):
            raise ValueError('KWTemperatureHook found no KW layer in the model '
                             f'{runner.model_name!r}; remove the hook or use a KW model')
        self._finished = False
        last = self.temperature(runner.max_iters)
        if last > 0:
            print_log(f'Training ends after {runner.max_iters} iterations at temperature '
                      f'{last:.4g}, while stand-alone tests will run at 0', 'current',
                      logging.WARNING)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Sets and logs the temperature until it has reached its last value."""
        if not self._finished:
            self._set(runner, runner.iter + 1)
            runner.message_hub.update_scalar('train/tau', self.temperature(runner.iter + 1))
            # The log keeps showing the last value.
            self._finished = runner.iter + 1 >= self._length

    def temperature(self, num_iters: int) -> float:
        """The temperature in the last of ``num_iters`` iterations; ``start`` if there are none."""
        fraction = min(1, num_iters / self._length)
        # Not start + (end - start) * fraction, which may miss end by a rounding error.
        return (1 - fraction) * self.start + fraction * self.end

    def _set(self, runner: Any, num_iters: int) -> int:
        tau = self.temperature(num_iters)
        return sum(set_temperature(model, tau) for model in _models(runner))


def _models(runner: Any) -> Iterator[nn.Module]:
    """The model and its averaged copies, which mmengine's hooks keep outside of it."""
    yield runner.model
    for hook in runner.hooks:
        if isinstance(getattr(hook, 'ema_model', None), nn.Module):
            yield hook.ema_model


def _iters_per_epoch(loader: DataLoader) -> int:
    sampler = getattr(loader.batch_sampler, 'sampler', None)
    if isinstance(sampler, InfiniteSampler):
        # Its length is that of the whole data set, of which each process sees a part.
        return math.ceil(len(loader) / sampler.world_size)
    return len(loader)


def _check_length(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f'{name} must be a positive integer, got {value!r}')
    if value < 1:
        raise ValueError(f'{name} must be a positive integer, got {value!r}')


def _check_temperature(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number in [0, 1], got {value!r}')
    if not 0 <= float(value) <= 1:
        raise ValueError(f'{name} must be a number in [0, 1], got {value!r}')
