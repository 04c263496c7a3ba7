"""Logs what the attentions of a model do while it is trained."""
from __future__ import annotations

import math
import statistics
from contextlib import ExitStack
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper

from ...layers.conv import KW_CONVS
from ...layers.mixing import MixingRecord, record_mixing


class KWMixingHook(Hook):
    """Logs how much of the start is left in the kernels, and how they vary between images.

    Every ``interval`` iterations it records the mixing weights of that iteration's images and logs,
    over the layers of the model (see ``MixingRecord``):

    * ``start_part`` and ``start_part_min``: the part of the mixing weights that is with the cells
      that mixtures are tied to, in the median layer and in that with the least of it;
    * ``variation`` and ``variation_max``: how far kernels are from the batch's mean kernel, as a
      part of its norm, in the median layer and in that with most of it. Of few images this is an
      underestimate, and of one it is 0.

    The last values are logged with the loss. A watched iteration takes longer.

    Args:
        interval: Iterations from one record to the next.

    Raises:
        ValueError: If ``interval`` is not a positive integer or, when training starts, if the model
            has no KW layer.
    """

    def __init__(self, interval: int = 50) -> None:
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f'interval must be a positive integer, got {interval!r}')
        self.interval = interval
        self._recording = ExitStack()

    def before_train(self, runner: Any) -> None:
        """Finds the layers."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self._convs: list[Any] = [module for module in model.modules()
                                  if isinstance(module, KW_CONVS)]
        if not self._convs:
            raise ValueError(f'KWMixingHook found no KW layer in the model {runner.model_name!r}; '
                             'remove the hook or use a KW model')

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Begins to record if it is time."""
        if self.every_n_train_iters(runner, self.interval):
            self._records = self._recording.enter_context(record_mixing(self._convs))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                         outputs: dict | None = None) -> None:
        """Logs what was recorded."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        self._recording.close()
        seen: dict[Any, MixingRecord] = {
            conv: record for conv, record in self._records.items() if record.count}
        parts = [record.start_part(conv.plan) for conv, record in seen.items()]
        spreads = [record.spread(conv.cells) for conv, record in seen.items()]
        for name, values, extreme in (('start_part', parts, min), ('variation', spreads, max)):
            values = [value for value in values if not math.isnan(value)]
            if values:
                suffix = extreme.__name__
                runner.message_hub.update_scalar(f'train/{name}', statistics.median(values))
                runner.message_hub.update_scalar(f'train/{name}_{suffix}', extreme(values))
