"""The benchmark: floors by hand, parity that fails when it should, times in turns, reports."""
import json
from pathlib import Path

import pytest
import torch
from kw_benchmark import machine, networks, parity, timing
from kw_benchmark.backbones import compare
from kw_benchmark.detectors import compare_detectors
from kw_benchmark.formulas import copy_with, literal_conv, plain_conv
from kw_benchmark.machine import Cost, Rates, assembly_costs, assembly_seconds
from kw_benchmark.memory import measure_memory
from kw_benchmark.networks import Subject, distinct_layers
from kw_benchmark.parity import Check, ParityError, check_network
from kw_benchmark.programs import inference, passes, training
from kw_benchmark.report import NO_GPU, Report
from kw_benchmark.setting import Setting, Workload, paper_suite, parse_shape
from kw_benchmark.timing import Times, time_in_turns
from torch import nn

import kw_mm
from kw_mm import KWConv2d, KWLinear, KWResNet, set_temperature
from kw_mm.layers import conv as conv_module

CONFIGS = Path(__file__).parents[2] / 'configs'
TINY = dict(depth=18, base_channels=4)
QUICK = dict(num_rounds=2, num_warmups=1, min_seconds=0)


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(),
        KWConv2d(8, 8, 3, padding=1, kw_cfg=dict(cell_num_ratio=2)), nn.BatchNorm2d(8))


# Floors.

# 3 mixtures of 5 cells of 8 numbers, 16 hidden units, 2 samples.
LAYER = dict(batch=2, mixtures=3, cells=5, cell_size=8, hidden=16)


def test_costs_by_hand():
    assert assembly_costs(**LAYER) == dict(
        cells=Cost(num_bytes=5 * 8 * 4, operations=2 * 3 * 5 * 8),
        bases=Cost(num_bytes=17 * 3 * 8 * 4, operations=2 * 17 * 3 * 8),
        # Of 16 units, 12 are active for one of two samples, 8 for each.
        active_bases=Cost(13 * 3 * 8 * 4, 2 * 9 * 3 * 8),
        training=Cost(num_bytes=640, operations=720))


@pytest.mark.parametrize('rates, cells, bases, training', [
    # With slow memory, 160, 1632 and 640 bytes count.
    (Rates(operations=1e9, bandwidth=10), 16, 163.2, 64),
    # With slow arithmetic, 240, 816 and 720 operations count.
    (Rates(operations=10, bandwidth=1e9), 24, 81.6, 72)])
def test_seconds_are_the_longer_of_reading_and_computing(rates, cells, bases, training):
    few, many = assembly_costs(**LAYER), assembly_costs(**dict(LAYER, cells=500))
    assert few['bases'].seconds(rates) == pytest.approx(bases)
    found = assembly_seconds([few], rates)
    assert found['cells'] == found['cells_or_bases'] == pytest.approx(cells)
    assert assembly_seconds([few], rates, training=True) == dict(cells=pytest.approx(training))
    found = assembly_seconds([many], rates)  # with so many cells, bases are smaller
    assert found['cells_or_bases'] == pytest.approx(bases)
    assert found['cells_or_active_bases'] < found['cells_or_bases']
    assert assembly_seconds([few, many], rates)['cells_or_bases'] == pytest.approx(cells + bases)


def test_half_precision_halves_the_bytes():
    assert assembly_costs(**LAYER, itemsize=2)['cells'] == Cost(80, 240)


def test_the_optimizer_s_part():
    rates = Rates(1, bandwidth=10)
    assert machine.optimizer_seconds(3, rates) == pytest.approx(3 * 5 * 4 / 10)
    assert machine.optimizer_seconds(-3, rates) == 0


def test_a_planned_layer():
    layer = KWConv2d(16, 32, 3, kw_cfg=dict(cell_num_ratio=2, cell_outplane_ratio=0.5))
    assert machine.layer_costs(layer.plan, 7) == assembly_costs(
        batch=7, mixtures=18, cells=36, cell_size=16 * 16, hidden=16)


def test_rates_are_measured():
    rates = machine.measure_rates(Setting(), size=8, num_bytes=4096)
    assert rates.operations > 0 and rates.bandwidth > 0
    assert machine.describe()['threads'] == torch.get_num_threads()


# Parity.

@pytest.mark.parametrize('build', [
    lambda: KWConv2d(4, 6, 3, 2, 1, groups=2, kw_cfg=dict(cell_num_ratio=2)),
    lambda: KWConv2d(8, 4, 3, padding='same', padding_mode='circular', dilation=2, kw_cfg=dict(
        cell_num_ratio=1, spatial_partition=False, cell_inplane_ratio=0.5, attn_norm='LN')),
    lambda: Subject('KWResNet', 0.5, TINY, dict(
        cell_inplane_ratio=0.5, cell_outplane_ratio=0.5,
        nonlocal_basis_ratio=1 / 16)).build().double().layer1[1].conv1])
@pytest.mark.parametrize('tau', [0, 0.3])
def test_literal_and_plain_layers_are_the_layer(build, tau):
    layer = build().double().eval()
    set_temperature(layer, tau)
    for parameter in layer.attention.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, layer.in_channels, 7, 6).double()
    with torch.no_grad():
        expected = layer(x)
        for conv in (literal_conv, plain_conv):
            torch.testing.assert_close(conv(layer, x), expected, rtol=1e-9, atol=1e-11)


def test_copies_leave_the_module_as_it_is():
    module = nn.Sequential(KWLinear(4, 6))
    calls = []
    copy = copy_with(module, lambda layer, x: calls.append(layer) or plain_conv(layer, x))
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(copy(x), module(x))
    assert calls == [copy[0].conv]


@pytest.mark.parametrize('setting', [
    Setting(), Setting(dtype=torch.bfloat16, amp=True), Setting(dtype=torch.bfloat16),
    Setting(channels_last=True)])
def test_what_is_right_passes(setting):
    checks = check_network(small_network(), setting, shape=(2, 16, 16))
    # The formulas, then outputs, optimised outputs and gradients of each precision.
    assert len(checks) == (4 if setting == Setting() else 7)
    assert all(check.passed for check in checks)


def test_gradients_are_compared_on_request():
    names = [check.name for check in check_network(small_network(), Setting(), shape=(2, 16, 16),
                                                   gradients=False)]
    assert names == ['plain formulas in float64', 'outputs in float32',
                     'optimised outputs in float32']


def test_wrong_formulas_fail(monkeypatch):
    right = parity.plain_alpha
    monkeypatch.setattr(parity, 'plain_alpha', lambda *args: right(*args) * (1 + 1e-7))
    assert failures() == ['plain formulas in float64']


def failures(shape=(2, 16, 16)):
    with pytest.raises(ParityError) as error:
        check_network(small_network(), Setting(), shape=shape)
    return [check.name for check in error.value.checks if not check.passed]


def test_a_wrong_kernel_fails(monkeypatch):
    right = conv_module.assemble_kernel
    monkeypatch.setattr(conv_module, 'assemble_kernel', lambda *args: right(*args) * (1 + 1e-4))
    # The optimised network may be computed in another way.
    assert {'outputs in float32', 'gradients in float32'} <= set(failures())


def test_a_wrong_gradient_fails(monkeypatch):
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * (1 + 1e-3)

    right = conv_module.assemble_kernel
    monkeypatch.setattr(conv_module, 'assemble_kernel', lambda *args: Scale.apply(right(*args)))
    assert failures() == ['gradients in float32']


def test_a_wrong_optimisation_fails(monkeypatch):
    right = kw_mm.optimize_for_inference_

    def optimise(module, memory_budget=None):
        with torch.no_grad():
            module[-1].weight.mul_(1.01)
        return right(module, memory_budget)

    monkeypatch.setattr(kw_mm, 'optimize_for_inference_', optimise)
    assert failures() == ['optimised outputs in float32']


def test_nan_never_passes():
    assert not Check('', float('nan'), 1e-9).passed
    assert parity._output_error([torch.zeros(2), torch.tensor([float('nan'), 1])],
                                [torch.ones(2), torch.ones(2)]) != 0
    assert not Check('', parity._output_error(
        [torch.ones(2), torch.tensor([float('nan'), 1])], [torch.ones(2)] * 2), 1).passed


def test_randomised_networks_attend_to_their_input_with_half_of_their_units():
    torch.manual_seed(0)
    model = Subject('KWResNet', 1, TINY).build()
    x = networks.make_images(4, 64, 64)
    assert model.layer1[0].bn2.weight.abs().max() == 0
    networks.randomise_(model, x)
    assert model.layer1[0].bn2.weight.min() > 0 and model.training
    assert model.layer1[0].bn2.momentum == 0.1
    alphas, active = [], []
    attention = model.layer2[1].conv1.attention
    attention.register_forward_hook(lambda _, args, alpha: alphas.append(alpha))
    attention.norm1.register_forward_hook(lambda _, args, h: active.append((h > 0).float().mean()))
    with torch.no_grad():
        model.eval()(x)
    assert alphas[0].std(0).mean() > 0.02 * alphas[0].abs().mean()
    assert 0.2 < active[0] < 0.8


def test_folding_is_exact_and_leaves_the_network():
    model = Subject('KWResNet', 1, TINY).build(static=True).eval()
    x = networks.make_images(2, 32, 32)
    networks.randomise_(model, x)
    folded = networks.folded(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    for a, b in zip(folded(x), model(x)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert networks.folded(nn.Sequential(nn.Conv2d(3, 4, 1))) is None


def test_an_unknown_backbone():
    with pytest.raises(ValueError, match="backbone must be one of .*KWResNet.*, got 'ResNet'"):
        Subject('ResNet', 1)


# Timing.

def test_programs_take_turns():
    calls = []

    def program(name):
        def first(value):
            assert value is None
            calls.append(name)
            return name

        def second(value):
            assert value == name

        return dict(first=first, second=second)

    times = time_in_turns({name: program(name) for name in 'AB'}, num_rounds=3, num_warmups=1,
                          min_seconds=0)
    assert ''.join(calls) == 'AB' + 'AB' + 'BA' + 'AB'
    assert list(times['A'].phases) == ['first', 'second']
    assert len(times['B'].rounds('second')) == 3
    with pytest.raises(ValueError, match='num_rounds must be an integer >= 1, got 0'):
        time_in_turns({}, num_rounds=0)


def test_short_programs_are_repeated():
    calls = []
    times = time_in_turns(dict(A=dict(run=calls.append)), num_rounds=1, num_warmups=1,
                          min_seconds=0.01)
    assert len(calls) > 10
    assert times['A'].median() < 0.005  # the mean, not the sum


def test_ratios_are_of_the_same_round():
    static = Times(dict(forward=(1., 2., 4.), backward=(1., 2., 4.)))
    kw = Times(dict(forward=(2., 2., 12.), backward=(4., 2., 4.)))
    assert static.rounds() == (2, 4, 8) and static.median('forward') == 2
    assert str(kw.over(static)) == '2.00 (1.00..3.00)'
    assert kw.over(static, 'backward') == timing.Ratio(1, 1, 4)


def test_a_training_step_trains_and_frees_its_gradients():
    module = small_network()
    x = networks.make_images(2, 8, 8)
    phases = training(module, x, Setting())
    phases['backward'](phases['forward'](None))
    assert module.training and all(p.grad is not None for p in module.parameters())
    phases['optimizer'](None)
    assert all(p.grad is None for p in module.parameters())


def test_a_layer_s_pass_starts_without_the_gradients_of_shared_cells():
    network = KWResNet(**TINY, kw_cfg=dict(cell_num_ratio=1))
    layer = network.layer1[0].conv2
    phases = passes(layer, torch.randn(2, 4, 6, 6), Setting())
    phases['backward'](phases['forward'](None))
    assert layer.cells.grad is not None
    phases['forward'](None)
    assert layer.cells.grad is None


def test_inference_keeps_no_graph():
    module = small_network().train()
    y = inference(module, networks.make_images(1, 8, 8), Setting())['forward'](None)
    assert not y.requires_grad and not module.training


# Workloads.

@pytest.mark.parametrize('text, shape', [('2x480x640', (2, 480, 640)),
                                         ('8x3x224x224', (8, 224, 224)), ('3x3x4', (3, 3, 4))])
def test_shapes(text, shape):
    assert parse_shape(text) == shape


@pytest.mark.parametrize('text', ['224', '2x2', '0x8x8', '1x4x8x8', 'axbxc'])
def test_wrong_shapes(text):
    with pytest.raises(ValueError, match=f'BATCHxHEIGHTxWIDTH, as 2x480x640, got {text!r}'):
        parse_shape(text)


def test_the_paper_s_suite():
    assert [w.name for w in paper_suite(Setting())] == [
        'inference 1x3x224x224', 'inference 8x3x224x224', 'inference 1x3x800x1344',
        'training 2x3x480x640', 'memory 2x3x800x1344']
    names = [w.name for w in paper_suite(Setting(compile=True, channels_last=True))]
    assert names[0] == 'inference 1x3x224x224, float32, channels last, compiled'
    assert names[-1] == 'memory 2x3x800x1344, float32, channels last'
    names = [w.name for w in paper_suite(Setting('cuda', torch.bfloat16, compile=True,
                                                 cuda_graphs=True))]
    assert names[0] == (
        'inference 1x3x800x1344, GPU, bfloat16, channels last, compiled, CUDA graph')
    assert names[5] == 'training 2x3x800x1344, GPU, AMP bfloat16, compiled'
    assert len(names) == 10


@pytest.mark.parametrize('kind, setting, message', [
    ('speed', Setting(), "kind must be one of .*, got 'speed'"),
    ('training', Setting('cuda', cuda_graphs=True), 'captures inference alone, got training'),
    ('memory', Setting('cuda', cuda_graphs=True), 'captures inference alone, got memory'),
    ('memory', Setting(compile=True), 'compile must be False for memory on a CPU')])
def test_what_cannot_be_measured(kind, setting, message):
    with pytest.raises(ValueError, match=message):
        Workload(kind, 1, 8, 8, setting)


def test_cuda_graphs_need_cuda():
    with pytest.raises(ValueError, match="cuda_graphs needs a device of type 'cuda', got 'cpu'"):
        Setting(cuda_graphs=True)


# Tiny runs.

@pytest.mark.slow
def test_memory_of_a_step_in_a_process_of_its_own():
    subject = Subject('KWResNet', 4, dict(depth=18, base_channels=16))
    found = measure_memory(subject, Workload('memory', 2, 64, 64))
    # Weights, gradients, and the optimizer's momentum.
    assert found > 3 * 4 * sum(p.numel() for p in subject.build().parameters())


@pytest.mark.parametrize('name, options', [
    ('KWConvNeXt', dict(arch=dict(depths=(1, 1, 1, 1), channels=(8, 8, 16, 16)))),
    ('KWMobileNetV2', dict(widen_factor=0.1))])
def test_other_backbones(name, options):
    subject = Subject(name, 1, options)
    for kind in ('inference', 'training'):
        row = compare(subject, Workload(kind, 2, 32, 32), Rates(1e9, 1e9), **QUICK)
        assert ('static, folded' in row['seconds']) == (
            kind == 'inference' and name == 'KWMobileNetV2')
        assert all(ratio['low'] <= ratio['median'] <= ratio['high']
                   for ratio in row['ratios'].values())
        assert min(row['floors'].values()) > 1
        json.dumps(row)


def test_distinct_layers():
    model = KWResNet(**TINY, kw_cfg=dict(cell_num_ratio=1))
    found = distinct_layers(model, (3, 64, 64))
    assert sum(count for *_, count in found) == len(model.plan.layers)
    assert found[0] == ('layer1.0.conv1', (3, 4, 16, 16), 4)
    assert ('layer2.0.downsample.0', (3, 4, 16, 16), 1) in found


@pytest.mark.slow
def test_whole_detectors():
    folder = CONFIGS / 'demo'
    checks, rows = compare_detectors(
        str(folder / 'mask-rcnn_kw1x-r18_fpn_shapes.py'),
        str(folder / 'mask-rcnn_r18_fpn_shapes.py'), (1, 64, 64), Setting(),
        parity_shape=(2, 32, 32), **dict(QUICK, num_rounds=1))
    assert all(check.passed for check in checks)
    step, prediction = rows
    assert list(step['seconds']) == ['static', 'KW']
    assert list(prediction['seconds']) == ['static', 'static, folded', 'KW', 'KW, optimised']
    assert prediction['num_objects'] > 0
    with pytest.raises(ValueError, match="default_scope of .* must be 'mmdet', got 'mmseg'"):
        compare_detectors(str(folder / 'fpn_kw1x-r18_shapes.py'), '', (1, 64, 64), Setting())


# Reports.

def make_report():
    seconds = {'static': dict(total=0.1), 'static, folded': dict(total=0.08),
               'KW': dict(total=0.25), 'KW, optimised': dict(total=0.12345)}
    ratio = dict(median=2.5, low=2.25, high=3)
    return Report(
        dict(cpu='A processor', gpu='a card', threads=2, torch='2.0', date='today'), 'KWResNet',
        dict(float32=Rates(123.4e9, 56.78e9)), {'the network': [Check('a', 1e-9, 1e-8),
                                                                Check('b', 1e-7, 2e-7)]},
        rows=[
            dict(workload='inference 1x3x8x8', kind='inference', budget=4, seconds=seconds,
                 ratios={name: ratio for name in ('KW / static', 'KW, optimised / static',
                                                  'KW, optimised / static, folded')},
                 optimised_bytes=2_500_000,
                 floors=dict(cells=1.234, cells_or_bases=1.1, cells_or_active_bases=1.05)),
            dict(workload='training 1x3x8x8', kind='training', budget=4,
                 seconds={name: seconds[name] for name in ('static', 'KW')},
                 ratios={name: ratio for name in ('KW / static',
                                                  'KW / static, forward and backward')},
                 floors=dict(cells=1.5)),
            dict(workload='memory 1x3x8x8', kind='memory', budget=0.5,
                 memory={'static': dict(total=10**9), 'KW': dict(total=12 * 10**8)},
                 ratios={'KW / static': dict(median=1.2, low=1.2, high=1.2)}),
            dict(workload='training 2x3x8x8, AMP bfloat16', kind='training', budget=4,
                 missing=NO_GPU)])


def test_a_report_in_markdown():
    text = make_report().markdown()
    for line in (
            '# KWResNet',
            '| workload | b | static ms | folded ms | KW ms | optimised ms | KW / static | '
            'optimised / static | optimised / folded | floor, cells | floor, cells or bases | '
            'floor, cells or active bases | optimised MB |',
            'A processor; a card; 2 threads; torch 2.0; today; float32: 123 G multiply-adds/s, '
            '56.8 GB/s.',
            'Parity of the network: 2 comparisons passed; the closest call is b, 1.0e-07 of at '
            'most 2.0e-07.',
            '| inference 1x3x8x8 | 4 | 100 | 80 | 250 | 123.5 | 2.50 (2.25..3.00) | '
            '2.50 (2.25..3.00) | 2.50 (2.25..3.00) | 1.23 | 1.1 | 1.05 | 2.5 |',
            '| training 1x3x8x8 | 4 | 100 | 250 | 2.50 (2.25..3.00) | 2.50 (2.25..3.00) | 1.5 |',
            '| memory 1x3x8x8 | 0.5 | 1000 | 1200 | 1.2 |',
            '| training 2x3x8x8, AMP bfloat16 | 4 | no GPU at hand, the script is ready |'):
        assert line in text.splitlines()
    assert '## Layers' not in text
    tables = [block.splitlines() for block in text.split('\n\n') if block.startswith('|')]
    assert len(tables) == 4
    for table in tables:
        assert len({line.count('|') for line in table}) == 1


def test_a_report_in_json():
    report = make_report()
    found = json.loads(report.json())
    assert found['rows'] == report.rows
    assert found['rates'] == dict(float32=dict(operations=123.4e9, bandwidth=56.78e9))
    assert found['checks']['the network'][1] == dict(name='b', error=1e-7, tolerance=2e-7)
