"""mmengine's initialisers, called by hand or by init_cfg, on KW layers."""
import logging
import sys
import types

import pytest
import torch
from mmcv.cnn import ConvModule
from mmcv.cnn.bricks import conv_module
from mmengine.model import (
    BaseModule,
    caffe2_xavier_init,
    constant_init,
    kaiming_init,
    normal_init,
    trunc_normal_init,
    uniform_init,
    weight_init,
    xavier_init,
)
from torch import nn

from kw_mm import (
    ConvSpec,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    compat,
    plan_warehouses,
    set_temperature,
)
from kw_mm.layers import WarehouseManager

RANDOM = [kaiming_init, xavier_init, normal_init, trunc_normal_init, uniform_init,
          caffe2_xavier_init]
# A layer, its input and its static twin.
LAYERS = {
    '1d': (lambda **kw: KWConv1d(6, 4, 3, padding=1, **kw), (2, 6, 7), nn.Conv1d(6, 4, 3)),
    '2d': (lambda **kw: KWConv2d(6, 4, 3, groups=2, **kw), (2, 6, 5, 4),
           nn.Conv2d(6, 4, 3, groups=2)),
    '3d': (lambda **kw: KWConv3d(6, 4, (1, 3, 1), **kw), (2, 6, 3, 3, 3),
           nn.Conv3d(6, 4, (1, 3, 1))),
    'linear': (lambda **kw: KWLinear(6, 4, **kw), (2, 5, 6), nn.Linear(6, 4)),
}


def kernels(layer, x):
    conv = layer.conv if isinstance(layer, KWLinear) else layer
    return conv.kernel(x.transpose(1, 2) if isinstance(layer, KWLinear) else x)


def shared():
    torch.manual_seed(0)
    manager = WarehouseManager(plan_warehouses([ConvSpec(n, 4, 4, (3, 3)) for n in 'ab'], None))
    return [KWConv2d(4, 4, 3, bias=False, manager=manager, name=name) for name in 'ab']


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('value', [0, 3])
# With a budget below 1 the start only holds at temperature 0.
@pytest.mark.parametrize('ratio, tau', [(0.5, 0), (1, 0), (1, 1), (4, 0), (4, 1)])
def test_constant_init(kind, value, ratio, tau):
    # It silently did nothing, and a branch that should start at zero did not.
    make, shape, _ = LAYERS[kind]
    layer = make(kw_cfg=dict(cell_num_ratio=ratio)).double()
    set_temperature(layer, tau)
    constant_init(layer, value, bias=2)
    x = torch.randn(shape).double()
    wanted = torch.full_like(kernels(layer, x), value)
    # The start is exact at temperature 0, and at 1 up to an error that depends on SELECT.
    torch.testing.assert_close(kernels(layer, x), wanted, rtol=1e-3 if tau else 1e-9, atol=1e-9)
    assert (layer.bias == 2).all()
    if value == 0:
        assert (layer(x) == 2).all()


@pytest.mark.parametrize('kind', LAYERS)
@pytest.mark.parametrize('initialise', RANDOM)
def test_random_ones_draw_what_the_static_layer_would_have(kind, initialise):
    make, shape, static = LAYERS[kind]
    layer = make()
    torch.manual_seed(3)
    initialise(static, bias=0.5)
    torch.manual_seed(3)
    initialise(layer, bias=0.5)
    kernel = kernels(layer, torch.randn(shape))
    torch.testing.assert_close(kernel[0], static.weight.reshape(kernel.shape[1:]))
    assert (layer.bias == 0.5).all()


@pytest.mark.parametrize('kind', LAYERS)
def test_training_leaves_a_zero_start(kind):
    make, shape, _ = LAYERS[kind]
    layer = make(bias=False)
    constant_init(layer, 0)
    check_it_moves(layer, torch.randn(shape), [p for p in layer.parameters() if p.dim() > 1])


def check_it_moves(layer, x, parameters):
    before = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.SGD({*layer.parameters(), *parameters}, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        y = layer(x)
        (y - 1).square().mean().backward()
        optimizer.step()
    assert layer(x).abs().max() > 0
    assert not any(torch.equal(p, b) for p, b in zip(parameters, before))


def test_zero_with_shared_cells_leaves_the_other_layers_alone():
    a, b = shared()
    x = torch.randn(2, 4, 5, 5)
    cells, before = a.cells.clone(), b(x)
    constant_init(a, 0)
    assert not a(x).any()
    assert torch.equal(b(x), before) and torch.equal(a.cells, cells)
    a.init_weights()
    assert not a(x).any()
    check_it_moves(a, x, [a.attention.fc1.weight, a.attention.fc2.weight, a.attention.fc2.bias,
                          a.cells])


def test_what_shared_cells_do_not_allow_is_told(caplog):
    a, _ = shared()
    x = torch.randn(2, 4, 5, 5)
    before = a(x)
    with pytest.raises(ValueError, match="constant_init can make the kernels of 'a' zero but not "
                                         '3, for other layers share its cells'):
        constant_init(a, 3)
    with caplog.at_level(logging.WARNING):
        compat.print_log('', logger='current')
        normal_init(a, std=0.01)
    assert torch.equal(a(x), before)


@pytest.mark.parametrize('cfg', [
    dict(type='Constant', val=0, layer=['KWConv2d', 'KWLinear']),
    dict(type='Constant', val=1, layer='BatchNorm2d', override=[
        dict(type='Constant', val=0, name='branch'), dict(type='Constant', val=0, name='fc')])])
def test_init_cfg(cfg):
    class Net(BaseModule):
        def __init__(self):
            super().__init__(cfg)
            self.branch = ConvModule(4, 4, 1, conv_cfg=dict(type='KWConv2d'), act_cfg=None)
            self.fc = KWLinear(4, 4)

    net = Net()
    net.init_weights()
    x = torch.randn(2, 4, 3, 3)
    assert not net.branch(x).any()
    assert not net.fc(x[..., 0, 0]).any()
    # An override reaches all modules below a name, and so those of the attention. Set to zero, they
    # would have stayed zero forever.
    for attention in (net.branch.conv.attention, net.fc.conv.attention):
        assert attention.fc1.weight.any() and attention.norm1.weight.all()
    check_it_moves(net.branch, x, [net.branch.conv.cells, net.branch.conv.attention.fc2.weight])


def test_initialisers_by_class_pass_over_the_inside_of_a_layer():
    # Models initialise every nn.Linear that they find, including those of attentions.
    layer = KWConv2d.from_conv(nn.Conv2d(4, 4, 3))
    net = nn.Sequential(layer, nn.Linear(4, 4))
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.BatchNorm1d)):
            trunc_normal_init(module, std=0.02, bias=1)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in before.items())
    assert (net[1].bias == 1).all()


def test_modules_that_imported_it_before_get_it_too(monkeypatch):
    assert conv_module.kaiming_init is weight_init.kaiming_init is kaiming_init
    original = weight_init.constant_init.__wrapped__
    early = types.ModuleType('early')
    early.constant_init = original
    monkeypatch.setitem(sys.modules, 'early', early)
    monkeypatch.setattr(weight_init, 'constant_init', original)
    compat.apply()
    replaced = weight_init.constant_init
    assert early.constant_init is replaced is not original
    compat.apply()
    assert weight_init.constant_init is replaced
