"""Base class of the KW backbones: warehouses, freezing, train mode, checks of arguments."""
from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit, initialize
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ...config import WarehouseConfig
from ...layers import KWConv2d, WarehouseManager
from ...layers.attention import AttentionBatchNorm
from ...layers.loading import check_fit
from ...plan import ConvSpec, WarehousePlan, plan_warehouses


class KWBackbone(BaseModule):
    """Base of backbones whose dynamic convolutions share warehouses.

    A subclass passes the geometry of its dynamic convolutions, builds every convolution with
    ``_conv``, and calls ``_freeze`` at the end.

    Freezing a stage freezes its attentions, norms and static convolutions. Cells are different,
    because frozen and trainable layers may share a warehouse. By default all cells stay trainable,
    as in the authors' detectors, so the kernels of a frozen layer can still change; with
    ``freeze_cells`` every warehouse that a frozen layer uses is frozen too.

    Layers behind the last output are built, so that all checkpoints of the network fit, but they
    are neither run nor trained.

    Args:
        specs: The dynamic convolutions in module order, named by their paths in the backbone.
        kw_cfg: Settings of the warehouses. Where it leaves something out, ``kw_defaults`` applies.
        static: Whether to build the static twin instead: the same network with an ordinary
            convolution at every path of ``specs``.
        frozen_stages: Stages up to this one are frozen, -1 for none.
        freeze_cells: Whether cells that a frozen layer draws on are frozen too.
        norm_eval: Whether batch norms use their running statistics in training, those in attentions
            included. If the latter have no statistics yet, as after a static start, they take them
            from the first batches (see ``AttentionBatchNorm.settle``).
        init_cfg: How mmengine initialises weights; None for the initial values of the method.

    Raises:
        ValueError: If ``init_cfg`` loads static weights in a way that would be ignored, or names
            two checkpoints, or a static twin is given a ``kw_cfg``.
    """

    kw_defaults: Mapping[str, Any] = {}
    init_cfg: Any  # set by mmengine, like is_init
    is_init: bool
    # How keys of a static checkpoint begin that are not in the backbone, and those that may be
    # missing.
    static_extras: tuple[str, ...] = ('fc.', 'head.', 'classifier.')
    static_optional: tuple[str, ...] = ()

    def __init__(self, specs: Iterable[ConvSpec],
                 kw_cfg: WarehouseConfig | Mapping[str, Any] | None, static: bool,
                 frozen_stages: int, freeze_cells: bool, norm_eval: bool,
                 init_cfg: Mapping[str, Any] | list | None) -> None:
        super().__init__(init_cfg)
        if not static:
            check_init_cfg(init_cfg)
        elif kw_cfg is not None:
            raise ValueError(f'kw_cfg must be None with static=True, got {kw_cfg!r}')
        config = WarehouseConfig.from_cfg(kw_cfg, **self.kw_defaults)
        self.frozen_stages = frozen_stages
        self.freeze_cells = freeze_cells
        self.norm_eval = norm_eval
        self.warehouse_manager = WarehouseManager(plan_warehouses(() if static else specs, config))

    @property
    def plan(self) -> WarehousePlan:
        """Who shares what; prints as a table. Empty in a static twin."""
        return self.warehouse_manager.plan

    def static_layouts(self) -> dict[str, dict[str, str]]:
        """Key layouts of static checkpoints that differ from the static twin's.

        By the name of the project that uses it: paths of our modules and their names there.
        """
        return {}

    def init_weights(self) -> None:
        """Initialises as ``init_cfg`` says; mmengine calls it before it loads checkpoints.

        A start from a checkpoint comes after all other initialisers, in whatever order they are
        listed. mmengine does this for ``Pretrained``; here it is done for ``StaticPretrained`` too.
        """
        if self.frozen_stages >= 0 and not self.init_cfg:
            print_log(f'frozen_stages={self.frozen_stages} without init_cfg: unless a checkpoint '
                      'is loaded, these stages stay at their random initial values',
                      logger='current', level=logging.WARNING)
        init_cfg, cfgs = self.init_cfg, as_list(self.init_cfg)
        starts = [cfg for cfg in cfgs if _starts_static(cfg)]
        if self.is_init or not starts:
            super().init_weights()
            return
        mark_initialised_(self)
        self.init_cfg = [cfg for cfg in cfgs if cfg not in starts]
        try:
            super().init_weights()
        finally:
            self.init_cfg = init_cfg
            self.is_init = False
        if len(starts) < len(cfgs):
            # The other initialisers treat the attentions as ordinary linear layers and norms, and
            # the static start does not set all of their tensors.
            for layer in _kw_convs([self]):
                layer.attention.reset_parameters()
        initialize(self, starts)
        self.is_init = True

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        check_fit(self, state_dict, prefix, may_lack=self.static_optional,
                  may_have=(*self.static_extras, *self.static_optional), is_backbone=True)

    def _conv(self, name: str, in_channels: int, out_channels: int, kernel_size: Any,
              **kwargs: Any) -> nn.Module:
        """The convolution at the path ``name``: dynamic where the plan has it, else static."""
        if name in self.plan.layers:
            return KWConv2d(in_channels, out_channels, kernel_size, **kwargs,
                            manager=self.warehouse_manager, name=name)
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, **kwargs)
        nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        return conv

    def _frozen_modules(self) -> list[nn.Module]:
        """The modules that ``frozen_stages`` freezes."""
        raise NotImplementedError

    def _idle_modules(self) -> list[nn.Module]:
        """The modules behind the last output, which do not run."""
        raise NotImplementedError

    def _freeze(self) -> None:
        idle = self._idle_modules()
        for module in (*self._frozen_modules(), *idle):
            for parameter in module.parameters():
                parameter.requires_grad = False
        # Distributed training would wait forever for gradients of cells that no running layer uses.
        running = {id(layer.cells) for layer in set(_kw_convs([self])) - set(_kw_convs(idle))}
        for cells in self.warehouse_manager.weights:
            cells.requires_grad = id(cells) in running
        if self.freeze_cells:
            for layer in _kw_convs(self._frozen_modules()):
                layer.cells.requires_grad = False

    def train(self, mode: bool = True) -> KWBackbone:
        """Sets train mode, except for frozen stages and, with ``norm_eval``, batch norms."""
        super().train(mode)
        if mode:
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, AttentionBatchNorm):
                        module.settle()
                    elif isinstance(module, _BatchNorm):
                        module.eval()
            for module in self._frozen_modules():
                module.eval()
        return self


def _kw_convs(modules: Iterable[nn.Module]) -> list[KWConv2d]:
    return [layer for module in modules for layer in module.modules()
            if isinstance(layer, KWConv2d)]


def as_list(init_cfg: Mapping[str, Any] | list | None) -> list[Mapping[str, Any]]:
    """The initialisers of an ``init_cfg``, one or several."""
    return list(init_cfg) if isinstance(init_cfg, Sequence) else [init_cfg] if init_cfg else []


def check_init_cfg(init_cfg: Mapping[str, Any] | list | None) -> None:
    """Refuses an ``init_cfg`` that a base config left behind for the static backbone.

    It is recognised by the checkpoint's name, before any download; a file with static weights is
    refused when it is loaded.

    Raises:
        ValueError: If it loads static weights, or names more than one checkpoint to start from.
    """
    cfgs = as_list(init_cfg)
    pretrained = [cfg for cfg in cfgs if cfg.get('type') in ('Pretrained', PretrainedInit)]
    for cfg in pretrained:
        checkpoint = str(cfg.get('checkpoint', ''))
        if checkpoint.startswith(('torchvision://', 'open-mmlab://')):
            raise ValueError(
                'init_cfg must not load static weights into a KW backbone, got checkpoint='
                f"{checkpoint!r}; set type='StaticPretrained' to start from them, name a KW "
                'checkpoint, or set init_cfg=None to start from scratch')
    starts = [cfg.get('checkpoint') for cfg in cfgs if cfg in pretrained or _starts_static(cfg)]
    if len(starts) > 1:
        raise ValueError('init_cfg must name one checkpoint to start from, for each would replace '
                         f'the one before, got {starts}')


def _starts_static(cfg: Mapping[str, Any]) -> bool:
    """Whether an initialiser is ``StaticPretrained``, given by name or as the class."""
    kind = cfg.get('type')
    if isinstance(kind, str):
        kind = WEIGHT_INITIALIZERS.get(kind)
    return getattr(kind, 'is_static_start', False)


def mark_initialised_(module: nn.Module) -> None:
    """Keeps mmengine from initialising the modules inside again, with new weights."""
    inner: Any
    for inner in module.modules():
        if inner is not module and hasattr(inner, 'init_weights'):
            inner.is_init = True


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raises ValueError unless the value is one of the choices."""
    choices = list(choices)
    if isinstance(value, bool) or value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}')


def check_indices(name: str, value: Sequence[int], num: int) -> tuple[int, ...]:
    """Returns rising indices below ``num`` as a tuple.

    Raises:
        ValueError: If they are not.
    """
    indices = tuple(value) if isinstance(value, Sequence) else (value,)
    if not indices or any(isinstance(i, bool) or not isinstance(i, int) for i in indices) or list(
            indices) != sorted(set(indices) & set(range(num))):
        raise ValueError(f'{name} must be rising indices from 0 to {num - 1}, got {value!r}')
    return indices


def check_drop_path_rate(value: float) -> None:
    """Raises ValueError unless the value is a probability below 1."""
    if not 0 <= value < 1:
        raise ValueError(f'drop_path_rate must be in [0, 1), got {value!r}')
