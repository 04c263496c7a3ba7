"""``optimize_for_inference_`` changes no output, for any network, budget and precision."""
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimised import bases_everywhere, error, optimised, optimised_with, outputs, randomise
from torch import nn

import kw_mm
from kw_mm import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    optimize_for_inference_,
    set_temperature,
)

NONLOCAL = dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5,
                nonlocal_basis_ratio=1 / 16)
TINY_ARCH = dict(depths=(1, 1, 2, 1), channels=(8, 8, 16, 16))
BACKBONES = {
    'r18': lambda: kw_mm.KWResNet(18, base_channels=8),
    'r18 4x': lambda: kw_mm.KWResNet(18, base_channels=8, kw_cfg=dict(cell_num_ratio=4)),
    'r50': lambda: kw_mm.KWResNet(50, base_channels=4, kw_cfg=dict(cell_num_ratio=2)),
    'r50 1/2x': lambda: kw_mm.KWResNet(50, base_channels=16, kw_cfg=NONLOCAL),
    'r18d': lambda: kw_mm.KWResNet(18, base_channels=8, deep_stem=True, avg_down=True,
                             strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    'whole cells': lambda: kw_mm.KWResNet(18, base_channels=4, num_stages=1, out_indices=(0,),
                                    kw_cfg=dict(spatial_partition=False)),
    'convnext': lambda: kw_mm.KWConvNeXt(TINY_ARCH),
    'convnext 4x': lambda: kw_mm.KWConvNeXt(TINY_ARCH, kw_cfg=dict(cell_num_ratio=4)),
    'mobilenet': lambda: kw_mm.KWMobileNetV2(0.1),
    'mobilenet 4x': lambda: kw_mm.KWMobileNetV2(0.1, share_pointwise=False,
                                          kw_cfg=dict(cell_num_ratio=4)),
    'regnet': lambda: kw_mm.KWConverted(dict(
        type='mmdet.RegNet', arch=dict(
            w0=24, wa=36, wm=2.5, group_w=8, depth=8, bot_mul=1.0))),
}


@pytest.mark.parametrize('kind', ['bases', 'cells'])
@pytest.mark.parametrize('name', BACKBONES)
def test_backbones(name, kind):
    model = randomise(BACKBONES[name]()).double()
    twin, report = optimised_with(kind, model)
    assert bool(report.num_bytes) == (kind == 'bases')
    if name != 'regnet':  # its blocks do not say which norm follows which convolution
        assert report.num_folded == sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    for batch in (1, 3):
        x = torch.randn(batch, 3, 64, 48).double()
        assert error(outputs(twin, x), outputs(model, x)) < 1e-10
        # In single precision, as exact as the network itself.
    exact, x = outputs(model, x), x.float()
    single, twin = model.float(), twin.float()
    bound = max(1e-5, 2 * error(outputs(single, x), exact))
    assert error(outputs(twin, x), exact) < bound
    assert error(outputs(optimised_with(kind, single)[0], x), exact) < bound


@st.composite
def networks(draw):
    """A layer of any geometry, with or without a norm behind it, and the shape of an input."""
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    sizes = lambda low, high: tuple(  # noqa: E731
        draw(st.lists(st.integers(low, high), min_size=dims, max_size=dims)))
    kernel_size, dilation, padding = sizes(1, 3), sizes(1, 2), sizes(0, 2)
    layer = (KWConv1d, KWConv2d, KWConv3d)[dims - 1](
        groups * draw(st.sampled_from([1, 2, 4])), groups * draw(st.sampled_from([1, 2, 4])),
        kernel_size, sizes(1, 3), padding, dilation, groups, draw(st.booleans()),
        kw_cfg=dict(cell_num_ratio=draw(st.sampled_from([0.3, 0.5, 1, 1.5, 4])),
                    cell_inplane_ratio=draw(st.sampled_from([0.5, 1])),
                    cell_outplane_ratio=draw(st.sampled_from([0.5, 1])),
                    nonlocal_basis_ratio=draw(st.sampled_from([0.5, 1])),
                    spatial_partition=draw(st.booleans()),
                    attn_norm=draw(st.sampled_from(['BN1d', 'LN']))))
    norm = draw(st.sampled_from([None, True, False]))
    layers = [layer]
    if norm is not None:
        kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        layers.append(kind(layer.out_channels, eps=0.1, affine=norm))
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for d, k, p in zip(dilation, kernel_size, padding)]
    shape = [low + draw(st.integers(0, 3)) for low in least]
    return randomise(nn.Sequential(*layers)).double(), (layer.in_channels, *shape)


@settings(deadline=None, max_examples=150)
@given(networks(), st.sampled_from(['bases', 'cells']), st.booleans())
def test_layers_of_any_geometry(drawn, kind, grad):
    model, shape = drawn
    twin, report = optimised_with(kind, model)
    assert report.layers[0].folded == (len(model) == 2) == isinstance(twin[-1], nn.Identity)
    for batch in (0, 1, 3):
        x = torch.randn(batch, *shape).double()
        assert error(outputs(twin, x, grad), outputs(model, x)) < 1e-10


@pytest.mark.parametrize('kind', ['bases', 'cells'])
@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('kwargs', [
    dict(padding='same', dilation=2), dict(padding='valid'), dict(padding=1, groups=4),
    dict(padding=1, padding_mode='circular', bias=False),
    dict(padding='same', padding_mode='reflect', groups=2),
    dict(padding=2, padding_mode='replicate', stride=2)])
def test_padding_and_groups(kind, dims, kwargs):
    layer = (KWConv1d, KWConv2d, KWConv3d)[dims - 1](4, 8, 3, **kwargs)
    model = randomise(nn.Sequential(layer)).double()
    twin, _ = optimised_with(kind, model)
    for batch in (0, 1, 3):
        x = torch.randn(batch, 4, *(7, 6, 5)[:dims]).double()
        assert error(outputs(twin, x), outputs(model, x)) < 1e-10


@pytest.mark.parametrize('kind', ['bases', 'cells'])
def test_linear_layers(kind):
    model = randomise(nn.Sequential(KWLinear(6, 4), nn.ReLU(), KWLinear(4, 8))).double()
    twin, report = optimised_with(kind, model)
    assert [layer.name for layer in report.layers] == ['0.conv', '2.conv']
    for shape in ((3, 6), (1, 5, 6), (0, 5, 6), (2, 3, 2, 6)):
        x = torch.randn(*shape).double()
        assert error(outputs(twin, x), outputs(model, x)) < 1e-10


@pytest.mark.parametrize('kind', ['bases', 'cells'])
@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('channels, ratio', [(32, 1), (64, 4), (128, 1)])
def test_sizes_at_which_paths_change(kind, memory_format, channels, ratio):
    # Cells in blocks, row by row, im2col or not, one sample or several.
    model = randomise(nn.Sequential(
        KWConv2d(channels, 128, 3, padding=1, bias=False, kw_cfg=dict(cell_num_ratio=ratio)),
        nn.BatchNorm2d(128), nn.ReLU(), KWConv2d(128, 256, 1), KWConv2d(256, 128, 1, 2)))
    model = model.double().to(memory_format=memory_format)
    twin, _ = optimised_with(kind, model)
    for shape in ((1, 5, 4), (3, 5, 4), (2, 12, 12)):
        x = torch.randn(shape[0], channels, *shape[1:]).double().contiguous(
            memory_format=memory_format)
        assert error(outputs(twin, x), outputs(model, x)) < 1e-10


@pytest.mark.parametrize('kw_cfg', [dict(), dict(attn_norm='LN'), dict(
    cell_num_ratio=2, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)])
def test_the_temperature_stays_in_effect(kw_cfg):
    # Bases ignore the assignment, so a layer with a temperature must not have any.
    model = randomise(nn.Sequential(KWConv2d(4, 8, 3, kw_cfg=kw_cfg), nn.BatchNorm2d(8),
                                    KWConv2d(8, 8, 1))).double()
    set_temperature(model[0], 0.3)
    with bases_everywhere():
        twin, report = optimised(model)
    assert [bool(layer.num_bases) for layer in report.layers] == [False, True]
    x = torch.randn(3, 4, 6, 5).double()
    expected = outputs(model, x)
    assert error(outputs(twin, x), expected) < 1e-10
    set_temperature(model, 0)
    assert error(outputs(model, x), expected) > 1e-2


@pytest.mark.parametrize('kind', ['bases', 'cells'])
@pytest.mark.parametrize('order', [('conv', 'norm', 'act'), ('conv', 'act', 'norm'),
                                   ('norm', 'conv', 'act'), ('act', 'conv', 'norm')])
def test_inside_conv_module(kind, order):
    from mmcv.cnn import ConvModule
    model = randomise(nn.Sequential(*(ConvModule(
        8, 8, 3, padding=1, order=order, norm_cfg=dict(type='BN', eps=0.1), act_cfg=dict(
            type='LeakyReLU'), conv_cfg=conv_cfg)
        for conv_cfg in (dict(type='KWConv2d'), None)))).double()
    twin, report = optimised_with(kind, model)
    assert report.num_folded == (2 if order == ('conv', 'norm', 'act') else 0)
    x = torch.randn(3, 8, 6, 5).double()
    assert error(outputs(twin, x), outputs(model, x)) < 1e-10


def test_conv_module_without_a_norm():
    from mmcv.cnn import ConvModule
    # Its norm_name is None, which made getattr raise a TypeError.
    model = randomise(nn.Sequential(ConvModule(4, 4, 3, conv_cfg=dict(type='KWConv2d')))).double()
    twin, report = optimised(model)
    assert report.num_folded == 0
    x = torch.randn(2, 4, 6, 5).double()
    assert error(outputs(twin, x), outputs(model, x)) < 1e-10


@pytest.mark.parametrize('kind', ['bases', 'cells'])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', ['r18 4x', 'convnext', 'mobilenet'])
def test_half_precision_errs_no_more_than_before(name, dtype, kind):
    model = randomise(BACKBONES[name]()).to(dtype)
    twin, _ = optimised_with(kind, model)
    exact = copy.deepcopy(model).double()
    for batch in (1, 3):
        x = torch.randn(batch, 3, 64, 48).to(dtype)
        expected = outputs(exact, x.double())
        found = outputs(twin, x)
        assert {y.dtype for y in found} == {dtype}
        assert error(found, expected) < 2 * error(outputs(model, x), expected) < 1


@pytest.mark.parametrize('kind', ['bases', 'cells'])
def test_autocast(kind):
    # A product that is given a place for its result is passed over by autocast and raised.
    # Weights that came from whatever ran before were now and then beyond the bound.
    torch.manual_seed(0)
    model = randomise(nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.BatchNorm2d(32), KWConv2d(32, 32, 3, padding=1),
        nn.BatchNorm2d(32), KWConv2d(32, 64, 1), nn.BatchNorm2d(64)))
    twin, _ = optimised_with(kind, model)
    for batch in (0, 1, 3):
        x = torch.randn(batch, 3, 16, 16)
        exact = outputs(model, x)
        with torch.autocast('cpu', torch.bfloat16):
            plain, found = outputs(model, x), outputs(twin, x)
        assert error(found, exact) <= max(2 * error(plain, exact), 0)
        assert found[0].dtype == torch.bfloat16
        assert error(outputs(twin, x), exact) < 1e-5


@pytest.mark.parametrize('kind', ['bases', 'cells'])
def test_storage_in_bfloat16(kind):
    model = randomise(kw_mm.KWResNet(18, base_channels=32, num_stages=3, out_indices=(1, 2)))
    full, half = (copy.deepcopy(model) for _ in range(2))
    budget = 0 if kind == 'cells' else None
    reports = [optimize_for_inference_(full, budget),
               optimize_for_inference_(half, budget, torch.bfloat16)]
    assert reports[1].num_bytes == reports[0].num_bytes / 2
    assert any(layer.num_bases for layer in reports[0].layers) == (kind == 'bases')
    stored = [sum(t.nbytes for name, t in twin.state_dict().items()
                  if name.endswith('bases') or 'warehouse_manager' in name)
              for twin in (full, half)]
    assert stored[1] == stored[0] / 2 if kind == 'cells' else stored[1] < stored[0]
    for batch in (1, 3):
        x = torch.randn(batch, 3, 48, 48)
        exact = outputs(model, x)
        assert all(y.dtype == torch.float32 for y in outputs(half, x))
        # The error of a rounded number is random, and at most 2^-9 of the number.
        assert 1e-4 < error(outputs(half, x), exact) < 1e-2
        assert error(outputs(full, x), exact) < 1e-5


def test_storage_that_saves_nothing_is_refused():
    model = nn.Sequential(KWConv2d(4, 4, 3))
    with pytest.raises(ValueError, match='storage_dtype must be torch.bfloat16 or None'):
        optimize_for_inference_(model, storage_dtype=torch.float16)
    with pytest.raises(ValueError, match='as narrow as'):
        optimize_for_inference_(model.bfloat16(), storage_dtype=torch.bfloat16)
    assert isinstance(model[0], KWConv2d)


def test_layers_left_as_they_are_keep_their_cells():
    model = randomise(kw_mm.KWResNet(18, base_channels=8, num_stages=1, out_indices=(0,)))
    model.layer1[0].conv1.register_forward_hook(lambda *_: None)
    twin = copy.deepcopy(model)
    report = optimize_for_inference_(twin, 0, torch.bfloat16)
    assert report.skipped == ('layer1.0.conv1',)
    x = torch.randn(2, 3, 48, 48)
    assert error(outputs(twin, x), outputs(model, x)) < 1e-5
