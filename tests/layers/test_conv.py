import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

from kw_mm import KWConv1d, KWConv2d, KWConv3d, KWLinear, WarehouseConfig, set_temperature
from kw_mm.ops import reference

LAYERS = {1: KWConv1d, 2: KWConv2d, 3: KWConv3d}


def literal_forward(layer, x):
    """The layer computed by reference functions only."""
    attention, plan = layer.attention, layer.plan
    hidden = attention.fc2(F.relu(attention.norm1(attention.fc1(x.flatten(2).mean(-1)))))
    rows = hidden.unflatten(1, (plan.num_mixtures, -1))
    if plan.num_basis:
        rows = reference.basis_logits(rows, attention.fc3.weight, attention.basis_bias,
                                      plan.assignment.first_cell)
    alpha = reference.mixing_weights(rows, attention.beta, attention.tau)
    kernel = reference.assemble_kernel(alpha, layer.cells, plan.grid, layer.kernel_size)
    return reference.dynamic_conv(x, kernel, layer.bias, layer.stride, layer.padding,
                                  layer.dilation, layer.groups)


@st.composite
def layers(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    sizes = lambda low, high: tuple(  # noqa: E731
        draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))
    kernel_size, dilation, padding = sizes(1, 3), sizes(1, 2), sizes(0, 2)
    partition = draw(st.booleans())
    layer = LAYERS[dims](
        groups * draw(st.sampled_from([1, 2, 4])), groups * draw(st.sampled_from([1, 2, 4])),
        kernel_size, sizes(1, 3), padding, dilation, groups, draw(st.booleans()),
        kw_cfg=dict(cell_num_ratio=draw(st.sampled_from([0.3, 0.5, 1, 1.5, 2])),
                    cell_inplane_ratio=draw(st.sampled_from([0.5, 1])),
                    spatial_partition=partition, attn_norm=draw(st.sampled_from(['BN1d', 'LN']))))
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for d, k, p in zip(dilation, kernel_size, padding)]
    size = [low + draw(st.integers(0, 3)) for low in least]
    return layer.double(), (draw(st.integers(0, 5)), layer.in_channels, *size)


@settings(deadline=None, max_examples=100)
@given(layers(), st.sampled_from([0., 0.4, 1.]))
def test_a_layer_equals_the_reference_with_every_gradient(drawn, tau):
    layer, shape = drawn
    set_temperature(layer, tau)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), literal_forward(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-11)
    leaves = [x, *layer.parameters()]
    weights = torch.randn_like(y)
    actual, wanted = (torch.autograd.grad((out * weights).sum(), leaves, allow_unused=True,
                                          materialize_grads=True) for out in (y, expected))
    for a, b in zip(actual, wanted):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('kwargs', [
    dict(), dict(stride=2, padding=1), dict(padding='same', dilation=2), dict(padding='valid'),
    dict(padding=1, padding_mode='circular'), dict(padding='same', padding_mode='reflect'),
    dict(padding=2, padding_mode='replicate', bias=False, groups=2)])
def test_at_temperature_one_it_is_the_static_convolution_of_its_cells(dims, kwargs):
    torch.manual_seed(0)
    layer = LAYERS[dims](4, 6, 3, **kwargs).double()
    static = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1](4, 6, 3, **kwargs).double()
    set_temperature(layer, 1)
    # One cell (out, in / groups, 1..) for each position.
    static.weight.data = layer.cells.detach().flatten(3).squeeze(-1).permute(1, 2, 0).reshape(
        static.weight.shape)
    if layer.bias is not None:
        layer.bias.data.normal_()
        static.bias.data = layer.bias.data
    x = torch.randn(2, 4, *(7, 6, 5)[:dims]).double()
    torch.testing.assert_close(layer(x), static(x))


def test_linear_is_the_convolution_over_tokens():
    torch.manual_seed(0)
    layer = KWLinear(6, 4).double()
    layer.conv.bias.data.normal_()
    x = torch.randn(3, 5, 2, 6).double()
    kernel = layer.conv.kernel(x.flatten(1, 2).transpose(1, 2))[..., 0]
    expected = torch.einsum('nhwc,noc->nhwo', x, kernel) + layer.conv.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[:, 0, 0]), layer(x[:, :1, 0])[:, 0])
    assert sorted(layer.state_dict())[:2] == ['conv.attention.fc1.weight',
                                              'conv.attention.fc2.bias']


def test_conv_module_builds_it_and_keeps_its_own_initial_values():
    from mmcv.cnn import ConvModule
    # ConvModule would Kaiming-initialise a convolution that has no init_weights.
    module = ConvModule(8, 8, 3, padding=1, norm_cfg=dict(type='BN'),
                        conv_cfg=dict(type='KWConv2d', kw_cfg=dict(cell_num_ratio=4)))
    assert isinstance(module.conv, KWConv2d)
    assert module.conv.cells.shape == (36, 8, 8, 1, 1)
    assert module.conv.bias is None
    assert module.conv.cells.std().item() == pytest.approx((2 / (36 * 8))**.5, rel=0.1)
    before = module.conv.cells.clone()
    module.conv.init_weights()
    assert not torch.equal(module.conv.cells, before)
    assert module(torch.randn(2, 8, 5, 5)).shape == (2, 8, 5, 5)


def test_repr_shows_warehouse_mixtures_and_cells():
    assert repr(KWConv2d(4, 4, 3, padding=1, groups=2)).splitlines()[1].strip() == (
        '4, 4, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=2, bias=True, '
        'warehouse=0, m=9, n=9, own_cells=0..8')
    assert repr(KWLinear(4, 2)).startswith('KWLinear(\n  in_features=4, out_features=2')


@pytest.mark.parametrize('ratio', [1, 4])
def test_cells_start_as_a_convolution_of_their_size(ratio):
    layer = KWConv2d(64, 64, 3, kw_cfg=WarehouseConfig(cell_num_ratio=ratio))
    assert layer.cells.std().item() == pytest.approx(math.sqrt(2 / (9 * ratio * 64)), rel=0.02)


@pytest.mark.parametrize('kwargs, message', [
    (dict(kernel_size=0), 'kernel_size must be an integer >= 1 or 2 of them, got 0'),
    (dict(kernel_size=(3, 3, 3)), r'kernel_size must .*got \(3, 3, 3\)'),
    (dict(stride=0), 'stride must be an integer >= 1'),
    (dict(padding=-1), 'padding must be an integer >= 0'),
    (dict(padding='full'), "padding must be integers, 'same' or 'valid', got 'full'"),
    (dict(padding='same', stride=2), "padding='same' needs stride 1"),
    (dict(padding_mode='mirror'), "padding_mode must be one of .*got 'mirror'"),
    (dict(groups=3), 'groups of the layer must divide in_channels=4, got 3'),
    (dict(kw_cfg=dict(cell_num_ratio=(1, 1))), 'cell_num_ratio .*1 warehouses, got 2 entries'),
])
def test_wrong_arguments_are_told_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        KWConv2d(**{**dict(in_channels=4, out_channels=6, kernel_size=3), **kwargs})


def test_wrong_input_is_told():
    with pytest.raises(ValueError, match=r'x must be \(N, 4\) and 2 spatial .*got \(4, 5, 5\)'):
        KWConv2d(4, 4, 3)(torch.zeros(4, 5, 5))
    with pytest.raises(ValueError, match=r'x must be \(N, ..., 4\), got \(2, 3\)'):
        KWLinear(4, 4)(torch.zeros(2, 3))


def test_default_path_follows_device_dtype_and_autocast():
    layer = KWConv2d(4, 4, 3, device='cpu', dtype=torch.float64)
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    layer = KWConv2d(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 8, 8)
    expected = layer(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)
    half = layer.to(torch.bfloat16)(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize('layer', [KWConv1d(4, 4, 1), KWConv2d(4, 4, 3), KWConv3d(4, 4, 1),
                                   KWLinear(4, 4)])
def test_there_is_no_weight_and_who_asks_is_told(layer):
    # The error was "object has no attribute 'weight'", and a weight that was set had no effect.
    name = type(layer).__name__
    assert not hasattr(layer, 'weight')
    assert getattr(layer, 'weight', None) is None
    with pytest.raises(AttributeError, match=f'{name} has no weight: it mixes a kernel for each'):
        layer.weight.data.zero_()
    for value in (nn.Parameter(torch.zeros(4, 4)), torch.zeros(4, 4), None):
        with pytest.raises(AttributeError, match=f'{name} has no weight'):
            layer.weight = value
    with pytest.raises(AttributeError, match=f'{name} has no weight'):
        prune.l1_unstructured(layer, 'weight', amount=0.5)
    with pytest.raises(AttributeError, match=f"'{name}' object has no attribute 'weights'"):
        layer.weights  # noqa: B018
    assert layer.bias.shape == (4,)


@pytest.mark.parametrize('padding_mode', ['zeros', 'reflect'])
def test_geometry_that_is_set_later_counts(padding_mode):
    # Tools that dilate a network set these. Paddings other than zeros ignored it.
    torch.manual_seed(0)
    static = nn.Conv2d(4, 4, 3, stride=2, padding=1, padding_mode=padding_mode)
    layer = KWConv2d.from_conv(static)
    for conv in (static, layer):
        conv.stride, conv.dilation, conv.padding = (1, 1), (2, 2), (2, 2)
        conv._reversed_padding_repeated_twice = [2] * 4  # nn.Conv2d's own copy
    x = torch.randn(2, 4, 7, 6)
    torch.testing.assert_close(layer(x), static(x), rtol=1e-4, atol=1e-4)


def test_an_attention_that_is_hooked_or_wrapped_is_called():
    # Where nobody asks for mixing weights they are made inside of an operator. Hooks, and wrappers
    # that gather sharded parameters first, would never be called.
    layer, seen = KWConv2d(4, 6, 3).eval(), []
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        handle = layer.attention.register_forward_hook(lambda *args: seen.append(args[2].shape))
        torch.testing.assert_close(layer(x), expected)
        handle.remove()
        layer.attention = nn.Sequential(layer.attention)
        layer.attention.register_forward_hook(lambda *args: seen.append(args[2].shape))
        torch.testing.assert_close(layer(x), expected)
    assert seen == [(2, layer.plan.num_mixtures, layer.plan.num_cells)] * 2
