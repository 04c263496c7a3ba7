"""Builds any registered module with dynamic convolutions from a config."""
from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from torch import nn

from ..arguments import checks_arguments
from ..config import WarehouseConfig
from ..convert import plan_conversion, start_from_state_dict_
from .backbones.base import mark_initialised_
from .static_weights import build_model, warn_twice


@checks_arguments('module')
def KWConverted(module: Mapping[str, Any],
                kw_cfg: WarehouseConfig | Mapping[str, Any] | None = None,
                groups: Mapping[str, Any] | Sequence[Any] | None = None,
                filter: Sequence[str] = (), linear: bool = False) -> nn.Module:
    """Builds a registered module and returns it converted, see ``convert_to_kw_``.

    In a config: ``dict(type='KWConverted', module=dict(type='mmdet.RegNet', ...), kw_cfg=...)``
    wherever that module could be used. The result is the module itself, with its attributes, and
    its keys except for the converted layers.

    Building loads no weights, so testing needs only the config and a KW checkpoint. When training
    starts, the Runner calls ``init_weights``, and the module starts from the static weights that
    the unconverted module would have: those of its ``init_cfg`` (``Pretrained``) and its
    children's.

    Args:
        module: Config of the module. Its type may have a scope; otherwise it is looked up in the
            current one.
        kw_cfg: Settings of the warehouses.
        groups: Which layers share a warehouse; None finds groups from the module tree.
        filter: Globs of layers' paths that stay static.
        linear: Whether to convert the linear layers of MLPs, too.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If a glob of ``filter`` matches nothing, or in the cases of ``convert_to_kw_``.
    """
    if not isinstance(module, Mapping) or 'type' not in module:
        raise TypeError(f'module must be the config of a registered module, got {module!r}')
    if isinstance(filter, str) or not isinstance(filter, Sequence) or not all(
            isinstance(pattern, str) for pattern in filter):
        raise TypeError(f'filter must be a list of globs, got {filter!r}')
    scope = DefaultScope.get_current_instance()
    start = StaticStart(module, scope and scope.scope_name)
    built = start.build()
    names = [name for name, _ in built.named_modules()]
    for pattern in filter:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ValueError(f'filter must match layers, but {pattern!r} matches none')
    conversion = plan_conversion(
        built, kw_cfg, groups,
        lambda _, name: not any(fnmatchcase(name, pattern) for pattern in filter), linear)
    plan = conversion.apply_(start=False)
    print_log(f'{type(built).__name__} converted\n{plan}', logger='current')
    start.module = built
    # Replaces the method of the class, which would draw new weights for the KW layers.
    built.init_weights = start  # type: ignore[assignment]
    return built


class StaticStart:
    """The ``init_weights`` of a converted module.

    Builds the static module again, lets it initialise itself, and starts from its weights.

    Args:
        cfg: Config of the static module.
        scope: The registry scope it is looked up in, or None.
    """

    def __init__(self, cfg: Mapping[str, Any], scope: str | None) -> None:
        self.cfg = copy.deepcopy(cfg)
        self.scope = scope
        self.module: Any = None

    def build(self) -> nn.Module:
        """The static module, with the weights that its constructor gives it."""
        return build_model(copy.deepcopy(self.cfg), self.scope)

    def __call__(self) -> None:
        if getattr(self.module, 'is_init', False):
            warn_twice(type(self.module).__name__)
            return
        static: Any = self.build()
        if hasattr(static, 'init_weights'):
            static.init_weights()
        report = start_from_state_dict_(self.module, static.state_dict())
        print_log(f'{type(self.module).__name__} starts from its static weights\n{report}',
                  logger='current', level=report.level)
        mark_initialised_(self.module)
        self.module.is_init = True
