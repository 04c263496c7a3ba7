"""Shortens logs by hundreds of lines that nobody reads."""
from __future__ import annotations

import logging
from collections import Counter
from typing import Any

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper


def shorten_log_(runner: Any) -> None:
    """Removes one to three lines for every parameter from a run's log.

    mmengine logs how each parameter was initialised and which optimizer settings it has. One line
    sums up the former. With ``log_level = 'DEBUG'`` nothing is removed.

    Args:
        runner: A runner that has been built and not started.
    """
    # mmengine sets the level of handlers, not that of the logger.
    if any(handler.level <= logging.DEBUG for handler in runner.logger.handlers):
        return
    runner.logger.addFilter(_is_worth_reading)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if hasattr(model, '_dump_init_info'):
        # mmengine calls it at the end of init_weights, while its records of what was done exist.
        model._dump_init_info = lambda: _summarize(model)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith('paramwise_options -- ')


def _summarize(model: Any) -> None:
    ways = Counter(info['init_info'].strip().splitlines()[0].rstrip(' ,.')
                   for info in model._params_init_info.values())
    lines = [f'  {num:>5}  {way}' for way, num in ways.most_common()]
    print_log('\n'.join(['Parameters were initialised so (log_level=DEBUG names each):', *lines]),
              logger='current')
