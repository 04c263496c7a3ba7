"""beta and the temperature, which no state dict has, are right after memory was replaced.

A network that was built on the meta device and loaded strictly used to return NaN or 1e31, though
all keys matched, because beta and tau contained whatever was in memory after ``to_empty``.
"""
import copy
import itertools
import pickle

import pytest
import torch
from torch import nn

from kw_mm import (
    KWConv1d,
    KWConv2d,
    KWConvNeXt,
    KWLinear,
    KWMobileNetV2,
    KWResNet,
    convert_to_kw_,
    set_temperature,
)
from kw_mm.layers import Attention


def converted():
    module = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3))
    convert_to_kw_(module, dict(cell_num_ratio=0.5), groups=['[02]'])
    return module


NETWORKS = dict(
    resnet=lambda: KWResNet(18, base_channels=8, kw_cfg=dict(
        cell_num_ratio=1.5, nonlocal_basis_ratio=0.5)),
    convnext=lambda: KWConvNeXt(dict(depths=(1, 1), channels=(16, 32)), out_indices=(0, 1)),
    mobilenet=lambda: KWMobileNetV2(0.1, kw_cfg=dict(cell_num_ratio=0.5)),
    converted=converted,
    layers=lambda: nn.Sequential(KWConv2d(3, 16, 3), nn.Flatten(2), KWConv1d(16, 32, 1),
                                 nn.AdaptiveAvgPool1d(4), nn.Flatten(), KWLinear(128, 8)))


@pytest.fixture(params=NETWORKS)
def build(request):
    def build(device='cpu'):
        with torch.device(device):
            return NETWORKS[request.param]().eval()

    torch.manual_seed(0)
    return build


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    real = torch.empty_like

    def empty_like(tensor, **kwargs):
        empty = real(tensor, **kwargs)
        return empty if empty.is_meta else empty.fill_(
            float('nan') if empty.is_floating_point() else -1)

    monkeypatch.setattr(torch, 'empty_like', empty_like)


def outputs(module, dtype=torch.float32):
    found = module(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)).to(dtype))
    return found if isinstance(found, tuple) else (found,)


def check(module, original, tau=0.0):
    attentions = [(m, m_) for m, m_ in zip(module.modules(), original.modules(), strict=True)
                  if isinstance(m, Attention)]
    assert attentions
    for attention, wanted in attentions:
        assert torch.equal(attention.beta, wanted.beta.to(attention.beta.dtype))
        assert (attention.tau.shape, attention.tau.dtype) == ((), torch.float64)
        assert attention.tau == tau
    for a, b in zip(outputs(module), outputs(original), strict=True):
        assert torch.equal(a, b)
    assert set(module.state_dict()) == set(original.state_dict())


WAYS = dict(
    to_empty=lambda build, net: net.to_empty(device='cpu'),
    copied=lambda build, net: copy.deepcopy(net).to_empty(device='cpu'),
    pickled=lambda build, net: pickle.loads(pickle.dumps(net)).to_empty(device='cpu'),
    twice=lambda build, net: net.to_empty(device='cpu').to('meta').to_empty(device='cpu'),
    half=lambda build, net: net.half().to_empty(device='cpu').float(),
    real=lambda build, net: build().to_empty(device='cpu'))


@pytest.mark.parametrize('way', WAYS)
def test_new_memory_is_written(build, way):
    original = build()
    net = WAYS[way](build, build('meta'))
    net.load_state_dict(original.state_dict(), strict=True)
    check(net, original)


def test_state_that_is_assigned(build):
    original = build()
    net = build('meta')
    net.load_state_dict(original.state_dict(), assign=True)
    check(net, original)
    # Another dtype, which beta does not have yet.
    double = {key: value.double() if value.is_floating_point() else value
              for key, value in original.state_dict().items()}
    for net in (build(), build('meta')):
        net.load_state_dict(double, assign=True)
        for a, b in zip(outputs(net, torch.float64), outputs(original.double(), torch.float64)):
            assert torch.equal(a, b)
    net.load_state_dict(build('meta').state_dict(), assign=True)
    assert all(tensor.is_meta for tensor in itertools.chain(net.parameters(), net.buffers()))


def test_the_temperature_outlives_new_memory(build):
    original, net = build(), build()
    for module in (original, net):
        set_temperature(module, 0.3)
    net.half().to_empty(device='cpu').float()
    net.load_state_dict(original.state_dict())
    check(net, original, tau=0.3)
    # Without a value to keep, it is that of fine-tuning.
    net.to('meta').to_empty(device='cpu').load_state_dict(original.state_dict())
    set_temperature(original, 0)
    check(net, original)


def test_memory_that_is_kept_is_not_replaced(build):
    net = build()
    set_temperature(net, 0.3)
    before = dict(net.named_buffers())
    net.share_memory().float().cpu()
    assert all(tensor is before[name] for name, tensor in net.named_buffers())
    assert all(tensor.is_shared() for tensor in before.values())


def test_reset_parameters_of_what_holds_parameters(build):
    """Sharding calls it for models on the meta device; a list of cells had no such method."""
    net = build('meta')
    for module in net.modules():
        if list(itertools.chain(module.parameters(recurse=False), module.buffers(recurse=False))):
            module.to_empty(device='cpu', recurse=False)
            module.reset_parameters()
    assert all(tensor.isfinite().all() for tensor in net.state_dict().values())
    assert all(out.isfinite().all() for out in outputs(net))
    for a, b in zip(net.modules(), build().modules(), strict=True):
        if isinstance(a, Attention):
            assert torch.equal(a.beta, b.beta) and a.tau == 0


def test_reset_parameters_draws_a_layer_again():
    conv = KWConv2d(4, 4, 3)
    before = copy.deepcopy(conv.state_dict())
    nn.init.ones_(conv.bias)
    conv.is_init = True
    conv.init_weights()
    assert torch.equal(conv.bias, torch.ones(4))  # it started from static weights
    conv.reset_parameters()
    assert torch.equal(conv.bias, torch.zeros(4))
    for name in ('warehouse_manager.weights.0', 'attention.fc1.weight'):
        assert not torch.equal(conv.state_dict()[name], before[name])
