"""``to_static_``: the mean kernel, by hand and against each image's own."""
import copy

import pytest
import torch
from matrix import MODELS
from optimised import error, outputs, randomise
from torch import nn

import kw_mm
from kw_mm import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    convert_to_kw_,
    set_temperature,
    to_static_,
)


def test_a_fresh_static_start_gives_its_weights_back():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=2),
                        nn.Flatten(), nn.Linear(16 * 16, 8)).eval()
    before = copy.deepcopy(net.state_dict())
    convert_to_kw_(net, linear=True, groups=['0', '2', '4'])
    report = to_static_(net)
    assert [layer.num_kernels for layer in report.layers] == [0, 0, 0]
    assert 'bias' in str(report)
    after = net.state_dict()
    assert set(after) == set(before)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('tau', [0, 0.3])
@pytest.mark.parametrize('layer', [
    lambda: KWConv1d(4, 8, 3, padding=1), lambda: KWConv2d(4, 8, 3, stride=2, bias=False),
    lambda: KWConv3d(4, 4, 3, groups=2, kw_cfg=dict(attn_norm='LN')),
    lambda: KWConv2d(8, 8, 3, kw_cfg=dict(
        cell_num_ratio=0.5, cell_inplane_ratio=0.5, nonlocal_basis_ratio=0.5))])
def test_the_kernel_is_the_mean_of_those_of_the_images(layer, tau):
    model = randomise(nn.Sequential(layer())).double()
    set_temperature(model, tau)
    conv = model[0]
    shape = conv.in_channels, *(7, 8, 9)[:conv.num_dims]
    batches = [torch.randn(n, *shape).double() for n in (2, 3)]
    kernels = torch.cat([conv.kernel(x) for x in batches]).detach()
    report = to_static_(model, batches)
    torch.testing.assert_close(model[0].weight, nn.Parameter(kernels.mean(0)))
    spread = ((kernels - kernels.mean(0)).flatten(1).square().sum(1).mean().sqrt()
              / kernels.mean(0).norm())
    assert report.layers[0].num_kernels == 5
    assert report.layers[0].spread == pytest.approx(spread.item())
    assert type(model[0]).__name__ == f'Conv{conv.num_dims}d'


def test_one_image_gives_its_own_network():
    # With a single image each kernel is that image's: outputs are equal.
    for name in ('resnet18', 'resnet50', 'convnext', 'mobilenet', 'regnet', 'converted'):
        model = randomise(MODELS[name]())
        x = torch.randn(1, 3, 64, 64)
        expected = outputs(model, x)
        to_static_(model, [x])
        assert not any('attention' in key or 'warehouse' in key for key in model.state_dict())
        assert error(outputs(model, x), expected) < 1e-5, name


def test_the_static_twin_loads_it():
    model = kw_mm.KWResNet(18, base_channels=8).eval()
    to_static_(model)
    twin = kw_mm.KWResNet(18, base_channels=8, static=True)
    twin.load_state_dict(model.state_dict())
    assert not model.plan.layers


def test_layers_that_no_image_reaches_get_the_kernel_of_the_bias():
    model = randomise(kw_mm.KWResNet(18, base_channels=8, out_indices=(0, 1)))
    report = to_static_(model, [torch.randn(2, 3, 64, 64)])
    reached = {layer.name for layer in report.layers if layer.num_kernels}
    assert reached and all(name.startswith(('layer1', 'layer2')) for name in reached)
    assert any(layer.name.startswith('layer3') for layer in report.layers)


def test_what_cannot_be_made_static_is_told():
    model = nn.Sequential(KWConv2d(4, 4, 3), KWLinear(4, 4))
    with pytest.raises(ValueError, match='must be in evaluation mode'):
        to_static_(model)
    model.eval()
    with pytest.raises(ValueError, match='at least one batch'):
        to_static_(model, [])
    with pytest.raises(ValueError, match='put it into an nn.Sequential'):
        to_static_(model[0])
    with pytest.raises(ValueError, match='without any'):
        to_static_(nn.Sequential(nn.Linear(2, 2)).eval())
    model[0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="'0' is not"):
        to_static_(model)
    assert isinstance(model[0], KWConv2d)
