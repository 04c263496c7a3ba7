"""The networks that are compared, and what is done to them before they run."""
from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.cnn import fuse_conv_bn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import kw_mm

from ...layers import Attention
from ...models import KWConvNeXt, KWMobileNetV2, KWResNet
from ...models.backbones.convnext import ConvNeXtBlock

BACKBONES = {cls.__name__: cls for cls in (KWResNet, KWConvNeXt, KWMobileNetV2)}


def build_backbone(name: str, kw_cfg: Mapping[str, Any] | None = None,
                   **options: Any) -> nn.Module:
    """A backbone in which everything trains, or its static twin.

    Args:
        name: One of ``BACKBONES``.
        kw_cfg: Settings of the warehouses; None for the static twin.
        **options: Of the backbone.

    Raises:
        ValueError: If the name is unknown.
    """
    if name not in BACKBONES:
        raise ValueError(f'backbone must be one of {list(BACKBONES)}, got {name!r}')
    cls = BACKBONES[name]
    defaults = dict(frozen_stages=-1, norm_eval=False, drop_path_rate=0.0)
    known = inspect.signature(cls).parameters
    options = {**{key: value for key, value in defaults.items() if key in known}, **options}
    return cls(**options, static=kw_cfg is None, kw_cfg=kw_cfg)


def make_images(batch: int, height: int, width: int, channels: int = 3) -> Tensor:
    """Noise, of a brightness and contrast of its own in each image and channel.

    The means of pure noise are all alike, and so would be the attentions.

    Returns:
        ``(batch, channels, height, width)``.
    """
    images = torch.randn(batch, channels, height, width)
    level, contrast = torch.randn(2, batch, channels, 1, 1)
    return level + images * (0.5 + contrast.abs())


def randomise_(module: nn.Module, x: Tensor) -> None:
    """Gives a fresh network what a trained one has: a say for every layer, and statistics.

    At the start of training the last norm of a residual block is zero, a ConvNeXt block's scale a
    millionth, and the attention knows no bias, so that much could be wrong and not be seen.
    Running statistics become those of the images ``x``, in place.

    Args:
        module: Takes images; its mode is kept.
        x: Images, ``(N, 3, H, W)``, at least two.
    """
    was_training = {m: m.training for m in module.modules()}
    momenta = {}
    with torch.no_grad():
        for layer in module.modules():
            if isinstance(layer, (_BatchNorm, nn.LayerNorm)) and layer.weight is not None:
                layer.weight.uniform_(0.5, 1.5)
                layer.bias.normal_(std=0.2)
            if isinstance(layer, _BatchNorm):
                momenta[layer], layer.momentum = layer.momentum, 1.0
                layer.training = True
            elif isinstance(layer, ConvNeXtBlock) and layer.gamma is not None:
                layer.gamma.uniform_(0.5, 1.5)
            elif isinstance(layer, Attention):
                for bias, weight in ((layer.fc1.bias, layer.fc1.weight),
                                     (layer.fc2.bias, layer.fc2.weight),
                                     (layer.basis_bias, layer.fc2.weight)):
                    if bias is not None:
                        bias.normal_(std=weight.std().item())
        module(x)
        for layer, momentum in momenta.items():
            layer.momentum = momentum
            # A channel that is alike in these few images would be blown up in others.
            least = (layer.running_var + layer.running_mean.square()).mean()
            layer.running_var.clamp_(min=least.item())
    for layer, mode in was_training.items():
        layer.training = mode


def folded(module: nn.Module) -> nn.Module | None:
    """A copy for inference with batch norms folded into the static convolutions before them.

    Returns:
        None if there are none to fold.
    """
    folded_copy = fuse_conv_bn(copy.deepcopy(module).eval())
    count, before = (sum(isinstance(m, _BatchNorm) for m in net.modules())
                     for net in (folded_copy, module))
    return folded_copy if count < before else None


def optimised(module: nn.Module, memory_budget: int | None = None) -> tuple[nn.Module, Any]:
    """A copy after ``kw_mm.optimize_for_inference_``, and the report that returns.

    Args:
        module: Anything with KW layers inside.
        memory_budget: Bytes that the copy may take more; None for the default.
    """
    optimised_copy = copy.deepcopy(module).eval()
    return optimised_copy, kw_mm.optimize_for_inference_(optimised_copy,
                                                         memory_budget=memory_budget)
