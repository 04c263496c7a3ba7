"""Builds the networks that are compared, and prepares them."""
from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import kw_mm
from kw_mm.layers.conv import KW_CONVS
from kw_mm.models import KWConvNeXt, KWMobileNetV2, KWResNet
from kw_mm.models.random_weights import make_images, randomise_

BACKBONES = {cls.__name__: cls for cls in (KWResNet, KWConvNeXt, KWMobileNetV2)}
SHAPE = (2, 64, 64)  # batch, height and width of images for statistics or parity


@dataclass(frozen=True)
class Subject:
    """A backbone with a budget, all of whose parameters are trained.

    Attributes:
        name: Name of the backbone, one of ``BACKBONES``.
        budget: Cells per mixture.
        options: Options of the backbone, the same for both twins.
        kw_cfg: Further settings of the warehouses.

    Raises:
        ValueError: If the name is unknown.
    """

    name: str
    budget: float
    options: Mapping[str, Any] = field(default_factory=dict)
    kw_cfg: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.name not in BACKBONES:
            raise ValueError(f'backbone must be one of {list(BACKBONES)}, got {self.name!r}')

    @property
    def label(self) -> str:
        """Name, options and budget."""
        return ', '.join((self.name, *(f'{key}={value}' for key, value in self.options.items()),
                          f'b={self.budget:g}',
                          *(f'{key}={value}' for key, value in self.kw_cfg.items())))

    def build(self, static: bool = False) -> nn.Module:
        """The network, or its static twin."""
        backbone = BACKBONES[self.name]
        options = dict(frozen_stages=-1, norm_eval=False, drop_path_rate=0.0)
        known = inspect.signature(backbone).parameters
        options = {key: value for key, value in options.items() if key in known}
        kw_cfg = None if static else dict(self.kw_cfg, cell_num_ratio=self.budget)
        return backbone(**{**options, **self.options}, static=static, kw_cfg=kw_cfg)

    def build_trained(self, static: bool = False) -> nn.Module:
        """The same, with half of the attentions' hidden units active, as after training."""
        module = self.build(static)
        randomise_(module, make_images(*SHAPE))
        return module


def folded(module: nn.Module) -> nn.Module | None:
    """A copy with batch norms folded into static convolutions; None if there are none."""
    folded_copy = fuse_conv_bn(copy.deepcopy(module).eval())
    count, before = (sum(isinstance(m, _BatchNorm) for m in net.modules())
                     for net in (folded_copy, module))
    return folded_copy if count < before else None


def optimised(module: nn.Module, memory_budget: int | None = None) -> tuple[nn.Module, Any]:
    """A copy after ``kw_mm.optimize_for_inference_``, and its report."""
    fast = copy.deepcopy(module).eval()
    return fast, kw_mm.optimize_for_inference_(fast, memory_budget=memory_budget)


def distinct_layers(module: nn.Module, shape: tuple[int, int, int]
                    ) -> list[tuple[str, tuple[int, ...], int]]:
    """One KW layer of each geometry in a placed network: name, shape of the input, number.

    ``shape`` is batch, height and width of the network's images.
    """
    names = {layer: name for name, layer in module.named_modules()}
    seen: dict[Any, list] = {}

    def note(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        plan, (x,) = layer.plan, args
        key = (plan.spec.weight_shape, layer.groups, layer.stride, layer.padding, layer.dilation,
               x.shape, plan.num_mixtures, plan.num_cells, plan.hidden, plan.num_basis)
        seen.setdefault(key, [names[layer], (shape[0], *x.shape[1:]), 0])[2] += 1

    hooks = [layer.register_forward_pre_hook(note) for layer in names
             if isinstance(layer, KW_CONVS)]
    parameter = next(module.parameters())
    with torch.inference_mode():
        module.eval()(torch.zeros(1, 3, *shape[1:], device=parameter.device,
                                  dtype=parameter.dtype))
    for hook in hooks:
        hook.remove()
    return [tuple(entry) for entry in seen.values()]
