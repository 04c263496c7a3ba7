"""A fit to the static network's feature maps brings back what b < 1 loses."""
import copy
import itertools

import pytest
import torch
from torch import nn

from kw_mm import KWConv2d, KWMobileNetV2, KWResNet, convert_to_kw_
from kw_mm.convert.state_dict import static_kernels
from kw_mm.models.fitting import fit_to_static_
from kw_mm.models.static_weights import load_static_


class Block(nn.Module):
    def __init__(self, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(16, 32, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(32)
        self.conv2 = nn.Conv2d(32, 16, 1)
        self.bn2 = nn.BatchNorm2d(16)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(Block(), Block(2))
        self.classes = nn.Linear(16, 10)

    def forward(self, x):
        return self.layer1(self.stem(x).relu())

    def classify(self, x):
        return self.classes(self(x).amax((2, 3)))


def images(seed, num=8):
    """Endless batches of coarse random patterns."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield nn.functional.interpolate(torch.randn(num, 3, 4, 4, generator=generator),
                                        scale_factor=4, mode='bilinear')


def networks(kw_cfg, groups=('layer1.*',)):
    """A static network, whose norms know other images, and the KW one that starts from it."""
    torch.manual_seed(0)
    static = Net()
    for batch in itertools.islice(images(1), 20):
        static(2 * batch + 0.5)
    static.eval()
    model = copy.deepcopy(static)
    convert_to_kw_(model, kw_cfg, groups=groups)
    return static, model


def call(net, x):
    return net(x)


def fit(static, model, steps=120, run=call):
    held_out = list(itertools.islice(images(2), 4))
    return fit_to_static_(model, static_kernels(model, static.state_dict()), run, images(3),
                          held_out, steps)


def agreement(static, model):
    """On how many images the same class stands out most."""
    x = torch.cat(list(itertools.islice(images(4), 25)))
    with torch.no_grad():
        first, second = (net.classify(x) for net in (static, model))
    return ((first - first.mean(0)).argmax(1) == (second - second.mean(0)).argmax(1)
            ).float().mean().item()


def test_a_fit_brings_the_static_network_nearer():
    static, model = networks(dict(cell_num_ratio=0.75))
    before = agreement(static, model)
    report = fit(static, model)
    assert report.after < 0.7 * report.before
    assert agreement(static, model) > before + 0.15
    # What was measured is what the model computes, with one kernel for all images.
    x = next(images(5, 2))
    assert not any(attention.fc2.weight.any() for attention in
                   (layer.attention for layer in model.modules() if isinstance(layer, KWConv2d)))
    model.train()(x).mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if 'layer1' in n)


def test_the_same_fit_gives_the_same_network():
    first, second = (networks(dict(cell_num_ratio=0.5)) for _ in range(2))
    assert str(fit(*first, steps=3)) == str(fit(*second, steps=3))
    for a, b in zip(first[1].state_dict().values(), second[1].state_dict().values()):
        assert torch.equal(a, b)


def test_warehouses_with_enough_cells_keep_their_kernels():
    static, model = networks(dict(cell_num_ratio=(0.5, 1)), ['layer1.*.conv1', 'layer1.*.conv2'])
    fit(static, model, steps=2)
    x = torch.randn(1, 32, 4, 4)
    torch.testing.assert_close(model.layer1[0].conv2(x), static.layer1[0].conv2(x),
                               atol=1e-3, rtol=1e-3)
    static, model = networks(dict(cell_num_ratio=1))
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='budget must be below 1 .*with b >= 1 the start is exact'):
        fit(static, model)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values()))


def test_layers_that_features_do_not_depend_on_are_named():
    static, model = networks(dict(cell_num_ratio=0.5))
    report = fit(static, model, steps=1, run=lambda net, x: net.layer1[0](net.stem(x).relu()))
    # The norms of heads lost their statistics.
    for name, value in static.layer1[1].bn1.state_dict().items():
        assert torch.equal(value, model.layer1[1].bn1.state_dict()[name])
    assert report.idle == ('layer1.1.conv1', 'layer1.1.conv2')
    assert 'not fitted' in str(report) and 'layer1.1.conv2' in str(report)


@pytest.mark.parametrize('backbone, kwargs', [
    (KWMobileNetV2, dict(widen_factor=0.25, with_cp=True)),
    (KWResNet, dict(depth=18, base_channels=8))])
def test_backbones_are_fitted(backbone, kwargs):
    torch.manual_seed(0)
    static = backbone(**kwargs, static=True).eval()
    model = backbone(**kwargs, kw_cfg=dict(cell_num_ratio=0.5)).eval()
    load_static_(model, static.state_dict())
    report = fit_to_static_(model, static_kernels(model, static.state_dict()), call,
                            (x.repeat(1, 1, 2, 2) for x in images(1, 2)),
                            [next(images(2, 2)).repeat(1, 1, 2, 2)], 1)
    assert report.idle == () and report.after > 0
