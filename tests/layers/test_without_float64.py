"""Devices without float64, such as Apple's GPUs, which mmengine uses by default."""
import pytest
import torch
from optimised import optimised, outputs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from kw_mm import KWConv2d, set_temperature
from kw_mm.inference import layers as inference_layers
from kw_mm.layers import attention, static_start


class NoFloat64(TorchDispatchMode):
    """Refuses every operation with float64, as an Apple GPU does."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        values = tree_flatten((args, kwargs or {}, result))[0]
        if any(isinstance(v, torch.Tensor) and v.dtype == torch.float64 for v in values):
            raise TypeError(f'{function}: no float64 on this device')
        return result


@pytest.fixture
def no_float64(monkeypatch):
    for module in (attention, static_start, inference_layers):
        monkeypatch.setattr(module, 'widest_dtype', lambda device: torch.float32)
    return NoFloat64()


def on_device(net):
    """Sets its temperatures as on such a device."""
    for layer in net.modules():
        if isinstance(layer, attention.Attention):
            layer.tau = layer.tau.float()
    return net


def test_the_device_is_what_it_stands_for():
    with pytest.raises(TypeError, match='no float64'), NoFloat64():
        torch.ones(2).double()


@pytest.mark.parametrize('ratio', [1, 0.5])
def test_start_train_and_optimise(no_float64, ratio):
    torch.manual_seed(0)
    net = on_device(nn.Sequential(KWConv2d(16, 32, 3, kw_cfg=dict(cell_num_ratio=ratio)),
                                  nn.BatchNorm2d(32)))
    weight, x = torch.randn(32, 16, 3, 3), torch.randn(4, 16, 8, 8)
    with no_float64:
        static_start.start_from_static_([(net[0], weight, torch.zeros(32))])
        if ratio == 1:
            torch.testing.assert_close(net[0](x), nn.functional.conv2d(x, weight), rtol=1e-4,
                                       atol=1e-4)
        set_temperature(net, 0.5)
        net(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        set_temperature(net, 0)
        net.eval()
        before = outputs(net, x)[0]
        twin, report = optimised(net)
        torch.testing.assert_close(outputs(twin, x)[0], before, rtol=1e-4, atol=1e-5)
    assert report.num_folded == 1
