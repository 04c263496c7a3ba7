"""The networks of the matrix test, and the functions that its other processes run."""
from __future__ import annotations

import functools

import numpy as np
import torch
import torch.distributed as dist
from mmdet.models.backbones import RegNet
from optimised import bases_everywhere, outputs, randomise
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy

from kw_mm import (
    KWConvNeXt,
    KWMobileNetV2,
    KWResNet,
    convert_to_kw_,
    optimize_for_inference_,
)
from kw_mm.layers import WarehouseManager

HALF = dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)


def resnet18() -> nn.Module:
    return KWResNet(18, base_channels=8, num_stages=1, out_indices=(0,), norm_eval=False)


def resnet50() -> nn.Module:
    return KWResNet(50, base_channels=8, num_stages=1, out_indices=(0,), norm_eval=False,
                    kw_cfg=dict(**HALF, nonlocal_basis_ratio=1 / 4))


def convnext() -> nn.Module:
    return KWConvNeXt(dict(depths=(1, 1), channels=(16, 32)), out_indices=(0, 1),
                      layer_scale_init_value=1)


def mobilenet() -> nn.Module:
    return KWMobileNetV2(0.1, out_indices=(0,), norm_eval=False)  # the layers behind it do not run


def regnet() -> nn.Module:
    net = RegNet(dict(w0=16, wa=16, wm=2, group_w=8, depth=2, bot_mul=1.0), stem_channels=8,
                 strides=(2, 2), dilations=(1, 1), out_indices=(0, 1), norm_eval=False)
    convert_to_kw_(net, dict(cell_num_ratio=2))
    return net


class Network(nn.Module):
    """Convolutions of many kinds, and linear layers on tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding='same', groups=2, bias=False), nn.BatchNorm2d(32),
            nn.ReLU(), nn.Conv2d(32, 16, 1), nn.Conv2d(16, 16, 5, 2, 2, groups=16),
            nn.Conv2d(16, 16, 3, 1, 2, 2, padding_mode='reflect'))
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.convs(x).permute(0, 2, 3, 1))


def converted() -> nn.Module:
    net = Network()
    convert_to_kw_(net, groups=['convs.[038]', 'convs.6', 'convs.7', 'mlp.*'], linear=True)
    return net


def bases() -> nn.Module:
    net = randomise(resnet18())
    with bases_everywhere():
        report = optimize_for_inference_(net)
    assert all(layer.num_bases for layer in report.layers)
    return net


def cells() -> nn.Module:
    net = randomise(resnet50())
    optimize_for_inference_(net, 0)
    return net


MODELS = dict(resnet18=resnet18, resnet50=resnet50, convnext=convnext, mobilenet=mobilenet,
              regnet=regnet, converted=converted, bases=bases, cells=cells)


def run(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs of a network in another process."""
    return [y.numpy() for y in outputs(net, x)]


# Which parts of a network are sharded separately. Torch's policy takes all that are large enough,
# cells included; it can be told to leave the cells to the root.
TORCH_POLICY = functools.partial(size_based_auto_wrap_policy, min_num_params=500)
POLICIES = dict(none=None, torch=TORCH_POLICY, told=functools.partial(
    TORCH_POLICY, force_leaf_modules={WarehouseManager}))


def run_sharded(rank: int, meeting_place: str, net: nn.Module, x: Tensor, policy: str,
                original: bool) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """Outputs and gradients of a sharded network, in one of two processes with half of a batch.

    Args:
        rank: Of the process.
        meeting_place: A file that does not exist yet, the same in both.
        net: The network.
        x: The whole batch.
        policy: A key of ``POLICIES``.
        original: Whether the network keeps its own parameters too. If not, there are no gradients
            to return.
    """
    dist.init_process_group('gloo', init_method=f'file://{meeting_place}', rank=rank, world_size=2)
    try:
        can_learn = any(p.requires_grad for p in net.parameters())
        sharded = FullyShardedDataParallel(net, device_id=torch.device('cpu'),
                                           auto_wrap_policy=POLICIES[policy],
                                           use_orig_params=original)
        found = outputs(sharded, x.chunk(2)[rank], grad=can_learn and original)
        grads = {}
        if can_learn and original:
            sum(y.square().mean() for y in found).backward()
            with FullyShardedDataParallel.summon_full_params(sharded, with_grads=True):
                grads = {n: p.grad.numpy().copy() for n, p in sharded.named_parameters()
                         if p.grad is not None}
        return [y.detach().numpy() for y in found], grads
    finally:
        dist.destroy_process_group()
