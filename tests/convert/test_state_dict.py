"""Static state dicts for KW networks."""
import pytest
import torch
from torch import nn

from kw_mm import KWConv2d, KWLinear, KWResNet, convert_to_kw_
from kw_mm.convert import start_from_state_dict_


class Net(nn.Module):
    """Two converted parts, a layer with a private warehouse, and static layers."""

    def __init__(self, kw=True):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32),
                                  nn.Conv2d(32, 32, 3))
        self.neck = nn.Conv2d(32, 16, 3)
        self.mlp = nn.ModuleDict(dict(a=nn.Linear(16, 16), b=nn.Linear(16, 16)))
        self.head = nn.Linear(16, 3)
        if kw:
            self.neck = KWConv2d.from_conv(self.neck)
            convert_to_kw_(self.body)
            self.mlp['a'] = KWLinear.from_linear(self.mlp['a'])

    def forward(self, x):
        x = self.neck(self.body(x)).mean((2, 3))
        return self.head(self.mlp['b'](self.mlp['a'](x)))


@pytest.fixture
def pair():
    torch.manual_seed(0)
    static, kw = Net(False).double().eval(), Net().double().eval()
    nn.init.uniform_(static.body[1].running_mean)
    return static, kw


def test_a_network_starts_from_its_static_state_dict(pair):
    static, kw = pair
    report = start_from_state_dict_(kw, static.state_dict())
    assert report.exact
    # Their paths in the whole network, which none of the three managers knows.
    assert [start.layers for start in report.warehouses] == [
        ('body.0', 'body.2'), ('neck',), ('mlp.a',)]
    x = torch.randn(2, 16, 7, 7).double()
    torch.testing.assert_close(kw(x), static(x), rtol=1e-9, atol=0)
    for part in ('body.1', 'head'):
        for name, value in kw.get_submodule(part).state_dict().items():
            assert torch.equal(value, static.state_dict()[f'{part}.{name}'])


def test_dimensions_of_size_one_and_counters_do_not_matter(pair):
    static, kw = pair
    state = static.state_dict()
    state['mlp.a.weight'] = state['mlp.a.weight'][:, :, None, None]
    state['head.weight'] = state['head.weight'][..., None]
    del state['body.1.num_batches_tracked']
    start_from_state_dict_(kw, state)
    x = torch.randn(2, 16, 7, 7).double()
    torch.testing.assert_close(kw(x), static(x), rtol=1e-9, atol=0)


def test_a_shared_layer_has_a_key_at_each_place():
    torch.manual_seed(0)
    net, static = nn.Module(), nn.Module()
    for module in (net, static):
        module.a = module.b = nn.Conv2d(16, 16, 3)
    convert_to_kw_(net)
    start_from_state_dict_(net, static.state_dict())
    torch.testing.assert_close(net.b.kernel(torch.zeros(1, 16, 1, 1))[0], static.a.weight)


def test_wrong_keys_are_told_and_nothing_has_changed(pair):
    static, kw = pair
    before = {k: v.clone() for k, v in kw.state_dict().items()}
    state = static.state_dict()
    del state['neck.weight'], state['head.bias']
    state['fc.weight'] = torch.zeros(2)
    state['body.0.weight'] = torch.zeros(32, 16, 1, 1)
    with pytest.raises(ValueError, match=r'2 missing: neck.weight, head.bias; 1 unknown: fc.weight'
                       r'; 1 misshapen: body.0.weight \(32, 16, 1, 1\) for \(32, 16, 3, 3\)$'):
        start_from_state_dict_(kw, state)
    assert all(torch.equal(v, before[k]) for k, v in kw.state_dict().items())
    with pytest.raises(ValueError, match=r'60 unknown: k0, k1.*k19, \.\.\.'):
        start_from_state_dict_(kw, {**static.state_dict(),
                                    **{f'k{i}': torch.zeros(1) for i in range(60)}})
    with pytest.raises(ValueError, match='must hold KW layers, got Net without any'):
        start_from_state_dict_(static, static.state_dict())


def test_a_backbone_starts_from_its_static_twin():
    torch.manual_seed(0)
    kwargs = dict(depth=50, base_channels=8, deep_stem=True, avg_down=True)
    static = KWResNet(**kwargs, static=True).double().eval()
    model = KWResNet(**kwargs, kw_cfg=dict(cell_num_ratio=2)).double().eval()
    start_from_state_dict_(model, static.state_dict())
    x = torch.randn(1, 3, 64, 64).double()
    for actual, expected in zip(model(x), static(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
