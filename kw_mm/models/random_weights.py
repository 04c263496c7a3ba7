"""Random weights with which every layer matters, as after training, for checks without any."""
from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import init_default_scope
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..config_types import without_downloads_
from ..layers import Attention
from .backbones.convnext import ConvNeXtBlock
from .static_weights import build_model

# The last layers of detectors' heads whose outputs are scores of classes, or of being an object.
_SCORES = {'fc_cls', 'retina_cls', 'rpn_cls', 'rtm_cls', 'cls_branches'}


def random_model(cfg: Config, seed: int = 0) -> nn.Module:
    """The detector or segmentor of a config with random weights, in evaluation mode.

    As they are initialised, detectors give all places nearly the same score. Here scores differ, so
    that something is found.
    """
    torch.manual_seed(seed)
    scope = cfg.get('default_scope', 'mmengine')
    init_default_scope(scope)
    model: Any = build_model(without_downloads_(copy.deepcopy(cfg.model)), scope)
    model = revert_sync_batchnorm(model)
    # It says of each parameter how it came about.
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.ERROR)
    model.init_weights()
    logger.setLevel(level)
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and set(name.split('.')) & _SCORES:
            nn.init.normal_(layer.weight, std=2 / layer.weight[0].numel()**0.5)
            assert layer.bias is not None
            # Losses that judge each class by itself leave most scores low.
            nn.init.normal_(layer.bias, 0 if name.endswith(('fc_cls', 'rpn_cls')) else -2, 0.5)
    # The other heads want to be told of objects.
    heads_too = not hasattr(model, 'roi_head') and not hasattr(model, 'decoder')
    randomise_(model, make_images(8, 128, 128),
               model._forward if heads_too else model.extract_feat)
    # Trained blocks add less to what they get. With branches as strong as that, rounding errors
    # multiply from block to block, in a KW-ResNet50 to a ten-thousandth in PyTorch alone.
    for block in model.backbone.modules():
        if hasattr(block, 'drop_path') or hasattr(block, 'downsample'):
            norms = [layer for name, layer in block.named_modules() if isinstance(
                layer, _BatchNorm) and not {'attention', 'downsample'} & set(name.split('.'))]
            if norms:
                norms[-1].weight.data *= 0.3
    model.eval()
    return model


def make_images(batch: int, height: int, width: int) -> Tensor:
    """Noise ``(batch, 3, height, width)``; level and contrast differ by image and channel.

    The means of pure noise would all be alike, and so would the attentions.
    """
    images = torch.randn(batch, 3, height, width)
    level, contrast = torch.randn(2, batch, 3, 1, 1)
    return level + images * (0.5 + contrast.abs())


def randomise_(module: nn.Module, x: Tensor, run: Callable[[Tensor], Any] | None = None) -> None:
    """Makes every layer of a new network matter, and sets running statistics, as after training.

    At the start of training the last norm of a residual block is zero, the scale of a ConvNeXt
    block is a millionth, and biases or weights of the attention are zero, which would hide errors.
    Running statistics become those of ``x``, at least two images. The mode is kept.

    Args:
        module: The network.
        x: The images.
        run: What of the network they go through; by default ``module(x)``.
    """
    was_training = {m: m.training for m in module.modules()}
    momenta: dict[Any, float | None] = {}
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
                # At a static start, one layer has weights of zero and biases that hold the start.
                if not layer.fc2.weight.any():
                    nn.init.normal_(layer.fc2.weight, std=layer.fc2.in_features**-0.5)
                for bias, weight in ((layer.fc1.bias, layer.fc1.weight),
                                     (layer.fc2.bias, layer.fc2.weight),
                                     (layer.basis_bias, layer.fc2.weight)):
                    if bias is not None and not bias.any():
                        bias.normal_(std=weight.std().item())
        (run or module)(x)
        for layer, momentum in momenta.items():
            layer.momentum = momentum
            # A channel that hardly varies in these few images would be scaled up too much.
            least = (layer.running_var + layer.running_mean.square()).mean()
            layer.running_var.clamp_(min=least.item())
    for layer, mode in was_training.items():
        layer.training = mode
