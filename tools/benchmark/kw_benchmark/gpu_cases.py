"""What is compared on a GPU: networks small enough for the loops of the method, in every setting.

``tests/gpu`` and ``python tools/benchmark gpu`` run the same cases.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from kw_mm import KWConv2d, KWConvNeXt, KWResNet
from kw_mm.ops import use_triton

from .parity import Check, check_network
from .setting import Setting

SHAPE = (2, 32, 32)


def resnet() -> nn.Module:
    """Bottlenecks: 1x1 and 3x3 kernels, strides, a warehouse for several layers."""
    return KWResNet(50, base_channels=16, num_stages=2, out_indices=(0, 1), norm_eval=False,
                    frozen_stages=-1, kw_cfg=dict(cell_num_ratio=2))


def convnext() -> nn.Module:
    """Depthwise kernels, linear layers, layer norms."""
    return KWConvNeXt(dict(depths=(1, 1), channels=(16, 32)), out_indices=(0, 1),
                      layer_scale_init_value=1)


def layers() -> nn.Module:
    """What the backbones have none of: groups, dilation, padding by name, a bias, few cells."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        KWConv2d(16, 32, 3, padding='same', groups=2, kw_cfg=dict(cell_num_ratio=2)),
        nn.BatchNorm2d(32), nn.ReLU(),
        KWConv2d(32, 16, 1, stride=2, kw_cfg=dict(cell_num_ratio=4, attn_norm='LN')), nn.ReLU(),
        KWConv2d(16, 16, 5, padding=4, dilation=2, bias=False,
                 kw_cfg=dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, spatial_partition=False)))


NETWORKS: dict[str, Callable[[], nn.Module]] = dict(resnet=resnet, layers=layers,
                                                    convnext=convnext)

HALVES = (torch.bfloat16, torch.float16)
# In the order of their worth. A setting's name is its label.
EAGER = (Setting(), Setting(dtype=torch.bfloat16, amp=True, channels_last=True),
         Setting(dtype=torch.float16, amp=True))
CAPTURED = tuple(Setting('cuda', dtype, amp, channels_last=layout, cuda_graphs=True)
                 for dtype, amp, layout in (
                     (torch.bfloat16, True, True), (torch.bfloat16, False, True),
                     (torch.float16, True, False), (torch.float32, False, True)))
COMPILED = (Setting(compile=True),
            *(Setting(dtype=dtype, amp=True, channels_last=layout, compile=True)
              for dtype, layout in zip(HALVES, (True, False))))
OTHERS = (Setting(channels_last=True), Setting(dtype=torch.bfloat16, amp=True),
          Setting(dtype=torch.float16, amp=True, channels_last=True),
          *(Setting(dtype=dtype, channels_last=layout) for dtype in HALVES
            for layout in (True, False)))


@dataclass(frozen=True)
class Case:
    """A network in a setting, with Triton or with torch's own products."""

    network: str
    setting: Setting
    triton: bool = False

    def __str__(self) -> str:
        return ', '.join((self.network, self.setting.label, *['Triton'] * self.triton))


def find_cases(device: str) -> list[Case]:
    """All of a device, the most telling first; of a CPU those that take it seconds."""
    if torch.device(device).type != 'cuda':
        return [Case(name, setting) for setting in EAGER[:2] for name in ('layers', 'convnext')]
    eager, captured, compiled, others = (
        [replace(s, device=device) for s in some] for some in (EAGER, CAPTURED, COMPILED, OTHERS))
    return [*(Case(name, s, triton) for triton in (False, True) for s in eager
              for name in ('resnet', 'layers')),
            *(Case('resnet', s, triton) for s in captured for triton in (False, True)),
            *(Case('resnet', s, triton) for s in compiled for triton in (False, True)),
            *(Case(name, s, triton) for s in others for triton in (False, True)
              for name in ('resnet', 'layers')),
            *(Case('convnext', s) for s in (*eager, *captured, *others))]


def run_case(case: Case) -> list[Check]:
    """Compares one.

    Raises:
        ParityError: If something differs.
    """
    torch.manual_seed(0)
    with without_tf32(), triton(case.triton):
        return check_network(NETWORKS[case.network](), case.setting, shape=SHAPE)


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Single precision is single precision, in convolutions too."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def triton(enabled: bool) -> Iterator[None]:
    """Asks for Triton kernels, if told to; afterwards for none."""
    if enabled:
        use_triton()
    try:
        yield
    finally:
        if enabled:
            use_triton(False)
