"""Which layers get bases within a budget, the report about them, and errors."""
from types import SimpleNamespace

import pytest
import torch
from optimised import bases_everywhere, error, optimised, outputs, randomise
from torch import nn

from kw_mm import KWConv2d, KWConvNeXt, KWLinear, KWResNet, optimize_for_inference_, set_temperature
from kw_mm.inference.budget import assembly_cost, bases_cost, bases_size, choose_layers


def plan(num_cells=40, num_mixtures=2, hidden=16, cell_shape=(8, 32, 1, 1)):
    return SimpleNamespace(num_cells=num_cells, num_mixtures=num_mixtures, hidden=hidden,
                           cell_shape=cell_shape)


def test_costs_by_hand():
    # 40 cells of 256 numbers are read once and mixed twice, at a tenth of that cost each. From
    # bases, 2 mixtures read half of the 16 bases and that of the bias.
    assert assembly_cost(plan()) == pytest.approx(40 * 256 * 1.2)
    assert bases_cost(plan()) == 9 * 2 * 256
    assert bases_size(plan()) == 17 * 2 * 256


def test_the_most_rewarding_layers_come_first():
    size = 17 * 2 * 256 * 4
    plans = dict(a=plan(num_cells=40), b=plan(num_cells=80), c=plan(num_cells=60),
                 cheap=plan(num_cells=10), narrow=plan(num_cells=90, cell_shape=(16, 16, 1, 1)))
    itemsizes = dict.fromkeys(plans, 4)
    for budget, chosen in ((0, ''), (size - 1, ''), (size, 'b'), (2 * size, 'bc'),
                           (10 * size, 'bca')):
        assert choose_layers(plans, itemsizes, budget) == list(chosen)


def test_smaller_layers_fill_what_is_left():
    plans = dict(large=plan(num_cells=400, num_mixtures=8), small=plan())
    itemsizes = dict.fromkeys(plans, 2)
    assert choose_layers(plans, itemsizes, 17 * 2 * 256 * 2) == ['small']


@pytest.fixture(scope='module')
def model():
    return randomise(KWResNet(18, base_channels=8, kw_cfg=dict(cell_num_ratio=2)))


@pytest.mark.parametrize('share', [0, 0.01, 0.3, 0.7, 0.999, 1])
def test_a_budget_is_kept_and_used(model, share):
    with bases_everywhere():
        _, everything = optimised(model)
        budget = int(share * everything.num_bytes)
        twin, report = optimised(model, budget)
    assert report.num_bytes == sum(layer.num_bytes for layer in report.layers) == sum(
        buffer.nbytes for name, buffer in twin.named_buffers() if name.endswith('bases')) <= budget
    # No layer that was left out would fit as well.
    least = min((layer.num_bytes for layer, got in zip(everything.layers, report.layers)
                 if not got.num_bases), default=budget + 1)
    assert least > budget - report.num_bytes
    x = torch.randn(2, 3, 64, 64)
    assert error(outputs(twin, x), outputs(model, x)) < 1e-5


def test_the_default_budget_takes_what_pays():
    # Many wide cells; the second layer has a single one.
    model = randomise(nn.Sequential(
        KWConv2d(32, 32, 1, kw_cfg=dict(cell_num_ratio=8, cell_outplane_ratio=0.5)),
        KWConv2d(32, 32, 1)))
    twin, report = optimised(model)
    assert [layer.num_bases for layer in report.layers] == [17, 0]
    assert report.num_bytes == 17 * 32 * 32 * 4
    x = torch.randn(1, 32, 4, 4)
    assert error(outputs(twin, x), outputs(model, x)) < 1e-5


def test_the_report_is_a_table(model):
    with bases_everywhere():
        twin, report = optimised(model, 100_000)
    lines = str(report).splitlines()
    assert lines[0].split() == ['layer', 'cells', 'bases', 'MiB', 'norm']
    assert len(lines) == 2 + len(report.layers) + 1
    for line, layer in zip(lines[2:], report.layers):
        name, cells, bases, mib, norm = line.split()
        assert (name, cells, norm) == (layer.name, f'{layer.num_cells:,}', 'folded')
        assert bases == (str(layer.num_bases) if layer.num_bases else '-')
        assert float(mib) == round(layer.num_bytes / 2**20, 1)
        assert f'bases={layer.num_bases}' in repr(twin.get_submodule(name)) or not layer.num_bases
    assert lines[-1] == f'{report.num_bytes / 2**20:.1f} MiB in bases, 20 norms folded'


def test_a_second_time_there_is_nothing_to_do(model):
    twin, report = optimised(model)
    assert report.layers
    before = dict(twin.named_modules())
    again = optimize_for_inference_(twin)
    assert (again.layers, again.num_folded, again.skipped, again.num_bytes) == ((), 0, (), 0)
    assert dict(twin.named_modules()) == before


def test_a_part_that_was_optimised_before():
    model = randomise(nn.Sequential(nn.Sequential(KWConv2d(4, 4, 3), nn.BatchNorm2d(4)),
                                    KWConv2d(4, 8, 3), nn.BatchNorm2d(8))).double()
    x = torch.randn(2, 4, 8, 8).double()
    expected = outputs(model, x)
    assert [layer.name for layer in optimize_for_inference_(model[0]).layers] == ['0']
    report = optimize_for_inference_(model)
    assert ([layer.name for layer in report.layers], report.num_folded) == (['1'], 1)
    assert error(outputs(model, x), expected) < 1e-10


def test_a_layer_cannot_be_replaced_in_itself():
    module = KWConv2d(4, 4, 3)
    with pytest.raises(ValueError, match='must contain KW layers, not be one, got a KWConv2d; put '
                                         'it into an nn.Sequential'):
        optimize_for_inference_(module)
    assert module.training


def test_a_linear_layer_can():
    layer = randomise(KWLinear(4, 4)).double()
    twin, _ = optimised(layer)
    x = torch.randn(3, 4).double()
    assert error(outputs(twin, x), outputs(layer, x)) < 1e-10


@pytest.mark.parametrize('module', [nn.Conv2d(4, 4, 3), nn.Sequential(nn.Linear(4, 4)),
                                    KWConvNeXt(dict(depths=(1,), channels=(8,)), static=True,
                                               out_indices=(0,))])
def test_nothing_to_optimise(module):
    with pytest.raises(ValueError, match=f'module must contain KW layers, got a '
                                         f'{type(module).__name__} without'):
        optimize_for_inference_(module)
    assert module.training


@pytest.mark.parametrize('budget, error, message', [
    (-1, ValueError, 'must be at least 0, got -1'), (1e9, TypeError, 'an integer of bytes, got 1'),
    ('1GB', TypeError, "got '1GB'"), (True, TypeError, 'got True')])
def test_budgets_that_are_none(budget, error, message):
    module = nn.Sequential(KWConv2d(4, 4, 3))
    with pytest.raises(error, match=f'memory_budget .*{message}'):
        optimize_for_inference_(module, budget)
    assert isinstance(module[0], KWConv2d) and module.training


def test_the_temperature_of_an_optimised_module_cannot_be_set(model):
    # Otherwise it would change the remaining layers, or do nothing.
    both = nn.Sequential(KWConv2d(4, 4, 3), optimised(model)[0])
    with pytest.raises(ValueError, match="must not be optimized for inference, .* of "
                                         "'1.layer1.0.conv1'"):
        set_temperature(both, 0.5)
    assert both[0].attention.tau == 0
    assert set_temperature(both[0], 0.5) == 1
