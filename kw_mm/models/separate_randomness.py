"""Parts of a model whose random numbers do not depend on what else is built."""
from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.registry import MODELS
from torch import nn


def WithOwnRandomNumbers(module: Mapping[str, Any]) -> nn.Module:
    """Builds a registered module that draws its initial weights from a generator of its own.

    In a config: ``dict(type='WithOwnRandomNumbers', module=dict(type='KWResNet', ...))``. The
    generator starts from the seed of the run, and torch's own generator is left as it was. So two
    models that differ in this module alone get the same random weights everywhere else, and draw
    the same numbers in training. The result is the module itself; its keys do not change.

    Args:
        module: Config of the module.

    Raises:
        TypeError: If ``module`` is no config.
    """
    if not isinstance(module, Mapping) or 'type' not in module:
        raise TypeError(f'module must be the config of a registered module, got {module!r}')
    seed = torch.initial_seed()
    with _generator_of_its_own(seed):
        built = MODELS.build(dict(module))
    if hasattr(built, 'init_weights'):
        # A partial of a function, because deepcopy and pickle keep that with the module.
        built.init_weights = functools.partial(_init_weights, built, seed)
    return built


def _init_weights(module: Any, seed: int) -> None:
    # Not the numbers that building has used, or layers of one shape would be alike.
    with _generator_of_its_own(seed + 1):
        type(module).init_weights(module)


@contextmanager
def _generator_of_its_own(seed: int) -> Iterator[None]:
    # Models are built on the CPU.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
