"""KW layers that start as static ones: exactly if there are enough cells, else approximately."""
import logging
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimised import perturb_norms_
from torch import nn

from kw_mm import (
    ConvSpec,
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    KWResNet,
    plan_warehouses,
    set_temperature,
)
from kw_mm.layers import StartReport, WarehouseManager, start_from_static_, static_start
from kw_mm.layers.mixing import record_mixing
from kw_mm.layers.static_start import MARGIN, SELECT, ZERO, cut_static
from kw_mm.ops import assemble_kernel

KW_CONVS = {1: KWConv1d, 2: KWConv2d, 3: KWConv3d}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def resnets(depth, kw_cfg, base_channels=8):
    """A static network and the KW network that starts from it, both float64."""
    torch.manual_seed(0)
    kwargs = dict(depth=depth, base_channels=base_channels, zero_init_residual=False)
    static = perturb_norms_(KWResNet(**kwargs, static=True)).double().eval()
    model = KWResNet(**kwargs, kw_cfg=kw_cfg).double().eval()
    state = static.state_dict()
    own = model.state_dict()
    model.load_state_dict({**own, **{k: v for k, v in state.items() if k in own}})
    report = start_from_static_(
        [(layer, state[f'{name}.weight'], None) for name, layer in model.named_modules()
         if isinstance(layer, KWConv2d)])
    return static, model, report


@pytest.mark.parametrize('depth, kw_cfg', [
    (50, dict()), (50, dict(cell_num_ratio=2)), (50, dict(cell_num_ratio=4)),
    (50, dict(cell_num_ratio=1.5, attn_norm='LN')), (18, dict(nonlocal_basis_ratio=1 / 16)),
    (18, dict(cell_inplane_ratio=0.5, cell_outplane_ratio=0.5))])
def test_a_network_starts_as_its_static_twin(depth, kw_cfg):
    static, model, report = resnets(depth, kw_cfg)
    assert report.exact and all(start.error < 1e-15 for start in report.warehouses)
    x = torch.randn(2, 3, 64, 64).double()
    expected = static(x)
    for tau, bound in ((0, 1e-9), (0.3, 2e-2), (1, 2e-2)):
        set_temperature(model, tau)
        error = max(map(relative, model(x), expected))
        assert error < bound
        assert (error > 1e-5) == (tau > 0)  # an error that cancels at 0 shows elsewhere


@pytest.mark.parametrize('kw_cfg', [dict(cell_num_ratio=2), dict(nonlocal_basis_ratio=1 / 16)])
@pytest.mark.parametrize('optimizer', [
    lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0), lambda p: torch.optim.SGD(p, 1e-2)])
def test_within_two_steps_everything_has_moved(kw_cfg, optimizer):
    _, model, _ = resnets(18, kw_cfg)
    model.train()
    optimizer = optimizer(model.parameters())
    x = torch.randn(2, 3, 64, 64).double()
    moved = []
    for _ in range(2):
        before = {n: p.clone() for n, p in model.named_parameters()}
        optimizer.zero_grad()
        sum(out.square().mean() for out in model(x)).backward()
        optimizer.step()
        moved.append({n: p != before[n] for n, p in model.named_parameters()})
    late = {n for n, changed in moved[0].items() if not changed.any()}
    assert {n.rpartition('attention.')[2] for n in late} == {
        'fc1.weight', 'norm1.weight', 'norm1.bias'} | ({'fc3.weight'} if 'nonlocal_basis_ratio'
                                                       in kw_cfg else set())
    assert [n for n, changed in moved[1].items() if not changed.any()] == []
    for name, layer in model.named_modules():
        if not isinstance(layer, KWConv2d):
            continue
        logits = 'basis_bias' if layer.plan.num_basis else 'fc2.bias'
        columns = moved[0][f'{name}.attention.{logits}'].view(layer.plan.num_mixtures, -1)
        assert columns.all(), name  # logits of each mixture: its own, other, spare and zero cells
    for i, warehouse in enumerate(model.plan.warehouses):
        tied = {c for p in warehouse.layers for c in p.assignment.columns}
        spare = [j for j in range(warehouse.num_cells) if j not in tied]
        first, second = (step[f'warehouse_manager.weights.{i}'].flatten(1).any(1)
                         for step in moved)
        assert first.sum() == len(tied) and not first[spare].any()
        assert second.all()


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))
    channels = st.sampled_from([2, 4, 6])
    size = lambda: draw(st.tuples(*[st.integers(1, 3)] * dims))  # noqa: E731
    conv = CONVS[dims](groups * draw(channels), groups * draw(channels), size(), size(), 1,
                       groups=groups, bias=draw(st.booleans()))
    kw_cfg = dict(cell_num_ratio=draw(st.sampled_from([0.25, 0.5, 1, 1.5, 4])),
                  cell_inplane_ratio=draw(st.sampled_from([0.5, 1])),
                  cell_outplane_ratio=draw(st.sampled_from([0.5, 1])),
                  spatial_partition=draw(st.booleans()),
                  attn_norm=draw(st.sampled_from(['BN1d', 'LN'])))
    return conv.double(), kw_cfg


@settings(deadline=None, max_examples=60)
@given(convolutions())
def test_from_conv(drawn):
    conv, kw_cfg = drawn
    layer = KW_CONVS[conv.weight.dim() - 2].from_conv(conv, kw_cfg)
    x = torch.randn(2, conv.in_channels, *[5] * (conv.weight.dim() - 2)).double()
    kernel = layer.kernel(x)
    torch.testing.assert_close(kernel[0], kernel[1])  # blind to the input
    pieces = cut_static(conv.weight, layer.plan)
    # As good as the singular values allow, and exact with enough cells.
    optimum = torch.linalg.svdvals(pieces)[layer.plan.num_cells:].norm().item()
    error = (kernel[0] - conv.weight).norm().item()
    assert error <= 1.01 * optimum + 1e-12 * conv.weight.norm()
    if layer.plan.num_cells >= layer.plan.num_mixtures:
        assert relative(layer(x), conv(x)) < 1e-9
    if conv.bias is not None:
        assert torch.equal(layer.bias, conv.bias)


def test_pieces_are_what_assembly_puts_in_place():
    layer = KWConv2d(8, 6, (3, 2), groups=2, kw_cfg=dict(cell_inplane_ratio=0.5))
    weight = torch.randn(layer.plan.spec.weight_shape)
    pieces = cut_static(weight, layer.plan)
    assert pieces.shape == (layer.plan.num_mixtures, 6 * 2)
    kernel = assemble_kernel(torch.eye(len(pieces))[None], pieces.view(-1, 6, 2, 1, 1),
                             layer.plan.grid, layer.kernel_size)
    assert torch.equal(kernel[0], weight)


@pytest.mark.parametrize('ratio', [1 / 2, 1 / 4])
@pytest.mark.parametrize('basis', [1, 1 / 16])
def test_with_fewer_cells_than_mixtures_it_is_the_best_approximation(ratio, basis):
    _, model, report = resnets(18, dict(
        cell_num_ratio=ratio, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5,
        nonlocal_basis_ratio=basis), base_channels=32)
    assert not report.exact
    for start in report.warehouses:
        assert start.optimum > 0.1
        assert start.error == pytest.approx(start.optimum, rel=1e-9)
    for attention in (m.attention for m in model.modules() if isinstance(m, KWConv2d)):
        alpha = attention(torch.randn(1, attention.fc1.in_features, 2, 2).double())[0]
        assert alpha.abs().sum(1).max() <= 1 - MARGIN + 1e-12
        bias = attention.fc2.bias if attention.basis_bias is None else attention.basis_bias
        logits = bias.view(attention.num_mixtures, -1)
        assert logits[:, -1].min() > 0
        torch.testing.assert_close(
            logits.abs().sum(1), torch.full((len(logits),), SELECT - 1e-3).double())


def test_the_optimum_of_a_warehouse_is_that_of_all_its_layers():
    """Two layers with equal kernels of rank 2 need no more than two cells."""
    specs = [ConvSpec(name, 4, 8, (1, 1)) for name in 'abcd']
    manager = WarehouseManager(plan_warehouses(specs, dict(cell_num_ratio=0.75))).double()
    layers = [KWConv2d(4, 8, 1, bias=False, manager=manager, name=name).double()
              for name in 'abcd']
    manager.reset_parameters()
    spare = manager.weights[0][2].clone()
    a, b = torch.randn(2, 8, 4, 1, 1).double()
    weights = [a, b, a - b, 2 * a + b]
    report = start_from_static_([(*pair, None) for pair in zip(layers, weights)])
    (start,) = report.warehouses
    assert (start.num_cells, start.num_mixtures, start.exact) == (3, 4, False)
    assert start.error < 1e-14 and start.optimum < 1e-14
    for layer, weight in zip(layers, weights):
        torch.testing.assert_close(layer.kernel(torch.zeros(1, 4, 1, 1).double())[0], weight)
    assert torch.equal(manager.weights[0][2], spare)  # random still, at coefficient 0
    assert all(layer.attention.fc2.bias[2] == 0 for layer in layers)


@pytest.mark.parametrize('ratio', [0.5, 1])
def test_kernels_of_zeros(ratio):
    conv = nn.Conv2d(4, 4, 3, padding=1)
    nn.init.zeros_(conv.weight)
    layer = KWConv2d.from_conv(conv, dict(cell_num_ratio=ratio))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(x), conv(x))


def test_logits_by_hand():
    conv = nn.Conv2d(4, 8, 1).double()
    layer = KWConv2d.from_conv(conv, dict(cell_num_ratio=2))
    assert layer.attention.fc2.bias.tolist() == [SELECT, 0, ZERO]
    assert layer.attention.fc2.weight.abs().sum() == 0
    alpha = SELECT / (SELECT + ZERO + 1e-3)
    torch.testing.assert_close(layer.cells[0] * alpha, conv.weight.detach())
    assert layer.cells[1].std().item() == pytest.approx(math.sqrt(2 / 16), rel=0.5)


@pytest.mark.parametrize('shape', [(5, 6), (5, 2, 3, 6)])
@pytest.mark.parametrize('bias', [True, False])
def test_from_linear(shape, bias):
    linear = nn.Linear(6, 4, bias).double()
    layer = KWLinear.from_linear(linear, dict(cell_num_ratio=2))
    x = torch.randn(shape).double()
    assert relative(layer(x), linear(x)) < 1e-12


@pytest.mark.parametrize('dtype, bound', [(torch.float32, 1e-6), (torch.float16, 2e-3),
                                          (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize('ratio', [0.5, 1])
def test_low_precision(dtype, bound, ratio):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 3).to(dtype)
    layer = KWConv2d.from_conv(conv, dict(cell_num_ratio=ratio))
    assert {p.dtype for p in layer.parameters()} == {dtype}
    pieces = cut_static(conv.weight.double(), layer.plan)
    optimum = torch.linalg.svdvals(pieces)[layer.plan.num_cells:].norm() / pieces.norm()
    kernel = layer.kernel(torch.zeros(1, 8, 1, 1, dtype=dtype))[0].double()
    assert (kernel - conv.weight.double()).norm() / pieces.norm() < optimum + bound


@pytest.mark.parametrize('learns', [(True, True), (False, False), (False, True)])
def test_a_copy_has_the_mode_and_what_learns_of_the_original(learns):
    conv = nn.Conv2d(4, 4, 3, stride=2, padding='valid', dilation=2, padding_mode='circular').eval()
    conv.weight.requires_grad, conv.bias.requires_grad = learns
    layer = KWConv2d.from_conv(conv)
    assert (layer.stride, layer.padding, layer.dilation, layer.padding_mode) == (
        conv.stride, conv.padding, conv.dilation, conv.padding_mode)
    assert not any(m.training for m in layer.modules())
    assert {p.requires_grad for n, p in layer.named_parameters() if n != 'bias'} == {learns[0]}
    assert layer.bias.requires_grad == learns[1]
    linear = nn.Linear(4, 4).eval()
    linear.weight.requires_grad, linear.bias.requires_grad = learns
    layer = KWLinear.from_linear(linear)
    assert {n for n, p in layer.named_parameters() if p.requires_grad} == {
        n for n, _ in layer.named_parameters() if learns[n == 'conv.bias']}
    assert not any(m.training for m in layer.modules())


def test_on_the_meta_device_there_is_nothing_to_compute():
    with torch.device('meta'):
        layer = KWConv2d.from_conv(nn.Conv2d(4, 4, 3), dict(cell_num_ratio=0.5))
        report = start_from_static_([(layer, torch.empty(4, 4, 3, 3), torch.empty(4))])
    assert layer.cells.is_meta
    assert math.isnan(report.warehouses[0].error)


def test_print_shows_the_error_of_each_warehouse():
    report = resnets(18, dict(cell_num_ratio=(1, 1, 0.5, 1)))[2]
    lines = str(report).splitlines()
    assert lines[0].split() == ['warehouse', 'first', 'layer', 'layers', 'cells', 'mixtures',
                                'start', 'error', 'optimum']
    assert [line.split()[5] for line in lines[2:-1]] == ['exact', 'exact', 'approximated', 'exact']
    assert lines[2].split()[:5] == ['0', 'layer1.0.conv1', '6', '56', '56']


def test_what_a_start_is_worth_is_said():
    """With b < 1 nothing is left of the static network, and "approximated" did not say so."""
    exact, poor = (resnets(18, dict(cell_num_ratio=(1, 1, b, b)))[2] for b in (1, 0.5))
    assert exact.warning is None and exact.level == logging.INFO
    errors = [start.error for start in poor.warehouses[2:]]
    assert f'in 2 of 4 warehouses: their kernels differ from the static ones by ' \
           f'{sum(errors) / 2:.1%} (median; the worst by {max(errors):.1%}, ' in poor.warning
    assert 'Nothing is left' in poor.warning and str(poor).endswith(poor.warning)
    assert poor.level == logging.WARNING

    def warning(error):
        return StartReport((replace(poor.warehouses[2], error=error),)).warning

    assert warning(1e-6) is None and warning(math.nan) is None
    assert '1.0% (median' in warning(0.01) and 'Nothing is left' not in warning(0.01)


class ScaledConv(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def test_wrong_arguments_are_told():
    with pytest.raises(TypeError, match='conv must be an nn.Conv2d, got ScaledConv'):
        KWConv2d.from_conv(ScaledConv(4, 4, 3))
    with pytest.raises(TypeError, match='conv must be an nn.Conv1d, got Conv2d'):
        KWConv1d.from_conv(nn.Conv2d(4, 4, 3))
    with pytest.raises(TypeError, match='linear must be an nn.Linear, got NonDynamically'):
        KWLinear.from_linear(nn.MultiheadAttention(4, 2).out_proj)
    layer = KWConv2d(4, 6, 3)
    with pytest.raises(ValueError, match=r'weight of the layer .*\(6, 4, 3, 3\), got \(6, 4\)'):
        start_from_static_([(layer, torch.zeros(6, 4), torch.zeros(6))])
    with pytest.raises(ValueError, match=r'bias of the layer must be of shape \(6,\), got None'):
        start_from_static_([(layer, torch.zeros(6, 4, 3, 3), None)])
    specs = [ConvSpec(name, 4, 8, (1, 1)) for name in 'ab'] + [
        ConvSpec('c', 4, 8, (1, 1), warehouse=1)]
    manager = WarehouseManager(plan_warehouses(specs))
    a = KWConv2d(4, 8, 1, bias=False, manager=manager, name='a')
    with pytest.raises(ValueError, match=r"all that share warehouse 0, but \['b'\] are missing"):
        start_from_static_([(a, torch.zeros(8, 4, 1, 1), None)])
    c = KWConv2d(4, 8, 1, bias=False, manager=manager, name='c')
    assert start_from_static_([(c, torch.ones(8, 4, 1, 1), None)]).warehouses[0].warehouse == 1
    with pytest.raises(ValueError, match="bias of layer 'a' must be None, got"):
        start_from_static_([(a, torch.zeros(8, 4, 1, 1), torch.zeros(8))])


def trained(steps, ratio, fc2_rate=1.0, lr=0.002):
    """A KW convolution after steps of Adam towards an output that no kernel reaches."""
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 8, 1, bias=False).double()
    layer = KWConv2d.from_conv(conv, dict(cell_num_ratio=ratio, cell_inplane_ratio=0.5,
                                          cell_outplane_ratio=0.5, attn_norm='LN'))
    fc2 = set(layer.attention.fc2.parameters())
    optimizer = torch.optim.Adam([
        dict(params=[p for p in layer.parameters() if p not in fc2]),
        dict(params=list(fc2), lr=lr * fc2_rate)], lr=lr, eps=1e-16)
    x, target = torch.randn(2, 6, 8, 4, 4).double()
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - target).square().mean().backward()
        optimizer.step()
    with record_mixing([layer]) as records, torch.no_grad():
        layer(x)
    return layer.kernel(x).detach(), records[layer].start_part(layer.plan)


def test_many_cells_do_not_thin_the_start_out(monkeypatch):
    # Adam moved each of n logits by as much, so that with many cells little was left of a start.
    _, few = trained(20, 2)
    _, many = trained(20, 32)
    assert many > few - 0.1 > 0.5
    monkeypatch.setattr(static_start, 'SELECT_CELLS', math.inf)
    assert trained(20, 32)[1] < 0.2


def test_a_larger_logit_is_a_smaller_rate_of_the_last_layer(monkeypatch):
    kernel, part = trained(10, 32)
    monkeypatch.setattr(static_start, 'SELECT_CELLS', math.inf)
    same, same_part = trained(10, 32, fc2_rate=10 / 128)
    assert part == pytest.approx(same_part, abs=1e-3)
    torch.testing.assert_close(kernel, same, rtol=0, atol=1e-3)
    other, _ = trained(10, 32)
    assert (other - kernel).abs().max() > 0.05
