"""Other types of convolutions: padded by the input's size, with standardised weight, declared."""
import copy
import pickle
from dataclasses import replace

import pytest
import timm_layers
import torch
import torch.nn.functional as F
from mmcv.cnn import Conv2d, ConvAWS2d, ConvWS2d, Linear
from mmcv.cnn.bricks import Conv2dAdaptivePadding
from mmdet.registry import MODELS as DET_MODELS
from mmseg.registry import MODELS as SEG_MODELS
from optimised import error, optimised_with, outputs, randomise
from timm_layers import (
    Conv2dSame,
    ScaledStdConv2d,
    ScaledStdConv2dSame,
    StdConv2d,
    StdConv2dSame,
)
from torch import nn

from kw_mm import KWConv2d, KWConverted, KWLinear, convert_to_kw_, set_temperature
from kw_mm.convert import (
    PlainConv,
    SamePadding,
    plan_conversion,
    start_from_state_dict_,
    treat_as_plain,
)
from kw_mm.convert.forms import FORMS

SIZES = ((9, 8), (8, 12), (7, 11), (13, 10))
LAYERS = {
    'adaptive': lambda: Conv2dAdaptivePadding(16, 32, 3, stride=2),
    'adaptive, dilated': lambda: Conv2dAdaptivePadding(16, 16, (3, 5), (2, 3), dilation=2,
                                                       groups=4, bias=False),
    'adaptive, depthwise': lambda: Conv2dAdaptivePadding(16, 16, 5, stride=2, groups=16),
    'adaptive, even kernel': lambda: Conv2dAdaptivePadding(16, 16, (2, 4)),
    'adaptive, stride beyond kernel': lambda: Conv2dAdaptivePadding(16, 16, 2, stride=4),
    'adaptive, pointwise': lambda: Conv2dAdaptivePadding(16, 32, 1, stride=2),
    'mmcv ws': lambda: ConvWS2d(16, 32, 3, stride=2, padding=1, groups=2),
    'mmcv aws': lambda: aws(ConvAWS2d(16, 32, 3, padding=2, dilation=2)),
    'mmcv conv': lambda: Conv2d(16, 32, 3, padding=1),
    'timm same': lambda: Conv2dSame(16, 32, 3, stride=2, bias=False),
    'timm same, stride 1': lambda: Conv2dSame(16, 16, 5, dilation=3, groups=16),
    'timm std': lambda: StdConv2d(16, 32, 3, padding=1, groups=4),
    'timm std same': lambda: StdConv2dSame(16, 32, 3, stride=2, eps=1e-8),
    'timm scaled': lambda: gained(ScaledStdConv2d(16, 32, 3, padding=1, gamma=1.7)),
    'timm scaled same': lambda: gained(ScaledStdConv2dSame(16, 32, 3, stride=2, dilation=2)),
}
# Layers that need a module for padding. The others are plain apart from their weight.
PADDED = {'adaptive', 'adaptive, dilated', 'adaptive, depthwise', 'adaptive, even kernel',
          'adaptive, stride beyond kernel', 'timm same', 'timm std same', 'timm scaled same'}
BY_STAGE = dict(groups=['*'], kw_cfg=dict(cell_num_ratio=2))


def aws(layer):
    nn.init.uniform_(layer.weight_gamma, 0.5, 2)
    nn.init.normal_(layer.weight_beta)
    return layer


def gained(layer):
    nn.init.uniform_(layer.gain, 0.5, 2)
    return layer


def pair(name):
    """A network with the layer, and its conversion."""
    torch.manual_seed(0)
    static = nn.Sequential(LAYERS[name](), nn.BatchNorm2d(16), nn.ReLU())
    static[1] = nn.BatchNorm2d(static[0].out_channels)
    static = randomise(static).double()
    net = copy.deepcopy(static)
    assert convert_to_kw_(net, **BY_STAGE).start.exact
    return static, net


def maps():
    torch.manual_seed(1)
    return [torch.randn(2, 16, *size).double() for size in SIZES]


def assert_same(net, static):
    for x in maps():
        assert error(outputs(net, x), outputs(static, x)) < 1e-12


@pytest.mark.parametrize('name', LAYERS)
def test_it_computes_the_same_for_any_size(name):
    static, net = pair(name)
    assert type(net[0]) is KWConv2d
    assert_same(net, static)
    assert isinstance(net[0].pad_input, SamePadding) == (name in PADDED)
    # The keys are those of any converted layer, because padding adds none.
    plain = nn.Sequential(nn.Conv2d(16, 32, 3, bias=static[0].bias is not None), static[1])
    convert_to_kw_(plain, **BY_STAGE)
    assert list(net.state_dict()) == list(plain.state_dict())
    # After training the kernels depend on the image, and the padding on its size.
    set_temperature(net, 1)
    randomise(net)
    shapes = [net(x).shape for x in maps()]
    assert shapes == [static(x).shape for x in maps()]


@pytest.mark.parametrize('name', LAYERS)
def test_the_layer_learns_if_the_static_one_did(name):
    torch.manual_seed(0)
    static = nn.Sequential(LAYERS[name](), nn.Sequential(nn.Conv2d(32, 32, 3)))
    static[0].weight.requires_grad = False
    static[0].eval()
    plan = plan_conversion(static, groups=['0', '1.*'])
    assert not static[0].training and static.training  # checking it has changed nothing
    plan.apply_()
    assert [p.requires_grad for p in static[-1].weights] == [False, True]
    assert not any(p.requires_grad for p in static[0].attention.parameters())
    assert not static[0].training


def test_attention_does_not_see_the_padding():
    _, net = pair('adaptive')
    seen = []
    net[0].attention.register_forward_hook(lambda module, args, y: seen.append(args[0].shape))
    net(maps()[0])
    assert seen == [(2, 16, 9, 8)]


@pytest.mark.parametrize('name', LAYERS)
def test_copies(name):
    static, net = pair(name)
    with timm_layers.importable():
        twins = copy.deepcopy(net), pickle.loads(pickle.dumps(net))
    for twin in twins:
        assert_same(twin, static)
        # They still know how the static layer's weights are stored.
        start_from_state_dict_(twin, static.state_dict())
        assert_same(twin, static)


@pytest.mark.parametrize('kind', ['bases', 'cells', 'default'])
@pytest.mark.parametrize('name', LAYERS)
def test_optimised_for_inference(name, kind):
    _, net = pair(name)
    randomise(net)
    twin, report = optimised_with(kind, net)
    assert report.layers[0].folded
    for x in maps():
        assert error(outputs(twin, x), outputs(net, x)) < 1e-12


@pytest.mark.parametrize('how, name', [
    *((how, name) for how in ('trace', 'fx') for name in sorted(PADDED)),
    *(pytest.param(how, name, marks=pytest.mark.slow) for how, name in (
        ('export', 'adaptive, dilated'), ('export', 'adaptive, stride beyond kernel'),
        ('compile', 'adaptive, stride beyond kernel'), ('compile', 'timm scaled same')))])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
def test_graphs_serve_other_sizes_than_the_example_s(how, name):
    static, net = pair(name)
    x = maps()[0]
    if how == 'trace':
        graph = torch.jit.trace(net, x, check_trace=False)
    elif how == 'export':
        sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC,
                 3: torch.export.Dim.DYNAMIC}
        graph = torch.export.export(net, (x,), dynamic_shapes=(sizes,)).module()
    elif how == 'fx':
        graph = torch.fx.symbolic_trace(net)
    else:
        graph = torch.compile(net, backend='eager', fullgraph=True, dynamic=True)
    assert_same(graph, static)


NETS = {
    'efficientnet': (DET_MODELS, dict(type='EfficientNet', arch='b0', out_indices=(2, 4, 6)),
                     dict(Conv2dAdaptivePadding=49)),
    'mobilenet_v3': (SEG_MODELS, dict(type='MobileNetV3', arch='small', out_indices=(0, 5, 12)),
                     dict(Conv2dAdaptivePadding=5)),
    'resnet_ws': (DET_MODELS, dict(
        type='ResNet', depth=50, base_channels=16, num_stages=2, strides=(1, 2), dilations=(1, 1),
        out_indices=(0, 1), conv_cfg=dict(type='ConvWS'), norm_cfg=dict(type='GN', num_groups=4)),
                  dict(ConvWS2d=24)),
}


@pytest.mark.parametrize('name', [
    pytest.param('efficientnet', marks=pytest.mark.slow), 'mobilenet_v3', 'resnet_ws'])
def test_networks_of_openmmlab(name):
    registry, cfg, kinds = NETS[name]
    torch.manual_seed(0)
    static = randomise(registry.build(cfg)).double()
    types = [type(m).__name__ for m in static.modules()]
    assert {kind: types.count(kind) for kind in kinds} == kinds
    net = copy.deepcopy(static)
    convs = [path for path, layer in net.named_modules() if isinstance(layer, nn.Conv2d)]
    plan = convert_to_kw_(net, groups=convs)
    assert list(plan.layers) == convs and not plan.static
    x = torch.randn(1, 3, 75, 66).double()
    assert error(outputs(net, x), outputs(static, x)) < 1e-9


def test_numbered_blocks_share_warehouses():
    # Each block was a stage of its own, and most layers would have had a single cell.
    plan = plan_conversion(SEG_MODELS.build(dict(type='MobileNetV3', arch='small'))).plan
    assert len(plan.layers) > len(plan.static)
    blocks = [{layer.spec.name.partition('.')[0] for layer in warehouse.layers}
              for warehouse in plan.warehouses]
    assert any(len(sharing) > 2 for sharing in blocks)
    assert plan.num_attention_parameters < plan.num_static_parameters


class Stored(nn.Module):
    """One layer of each kind."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.ModuleDict({f'l{i}': make() for i, make in enumerate(LAYERS.values())})


def test_a_static_state_dict_is_read_as_the_layers_read_it():
    static = Stored()
    for parameter in static.parameters():
        nn.init.normal_(parameter)
    net = Stored().double()
    convert_to_kw_(net, groups=[f'body.l{i}' for i in range(len(LAYERS))])
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = static.state_dict()
    with pytest.raises(ValueError, match='1 missing: body.l13.gain; 1 unknown: body.l0.gain$'):
        start_from_state_dict_(net, {k.replace('l13.gain', 'l0.gain'): v
                                     for k, v in state.items()})
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert start_from_state_dict_(net, state).exact
    static.double()
    for x in maps():
        for name, layer in net.body.items():
            torch.testing.assert_close(layer(x), static.body[name](x), rtol=1e-10, atol=1e-10)


def test_what_a_layer_makes_up_for_may_be_missing():
    # ConvAWS2d takes mean and scale from the weights of a file that has neither.
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU()).double()
    net = nn.Sequential(ConvAWS2d(16, 16, 3), nn.ReLU()).double()
    static = copy.deepcopy(net)
    static.load_state_dict(plain.state_dict())
    convert_to_kw_(net, groups=['0'])
    start_from_state_dict_(net, plain.state_dict())
    assert_same(net, static)


def test_kw_converted_starts_from_a_file_of_standardised_weights(tmp_path):
    cfg = dict(NETS['resnet_ws'][1], type='mmdet.ResNet')
    static = DET_MODELS.build(cfg)
    for norm in static.modules():
        if isinstance(norm, nn.GroupNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.save(static.state_dict(), tmp_path / 'ws.pth')
    net = KWConverted(dict(cfg, init_cfg=dict(type='Pretrained',
                                              checkpoint=str(tmp_path / 'ws.pth'))))
    static.eval()
    net.eval()
    x = torch.randn(1, 3, 64, 64)
    assert error(outputs(net, x), outputs(static, x)) > 0.1
    net.init_weights()
    assert error(outputs(net, x), outputs(static, x)) < 1e-4


@pytest.fixture
def forms():
    """Removes what a test has declared."""
    declared = dict(FORMS)
    yield
    FORMS.clear()
    FORMS.update(declared)


class Doubled(nn.Conv2d):
    """Twice the convolution of an input with replicated border."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.border = nn.ReplicationPad2d((0, 1, 2, 3))
        self.register_buffer('scale', torch.full((), 2.0))

    def forward(self, x):
        return F.conv2d(self.border(x), self.scale * self.weight, self.bias, self.stride)


def doubled(layer):
    return PlainConv.of(layer, weight=layer.scale * layer.weight, padding=0,
                        pad_input=layer.border)


@pytest.mark.parametrize('kind', [Doubled, f'{Doubled.__module__}.Doubled'])
def test_a_type_of_one_s_own(forms, kind):
    static = nn.Sequential(Doubled(16, 16, 3, stride=2, padding=1), nn.ReLU()).double()
    state = static.state_dict()
    with pytest.raises(ValueError, match='nothing matched.*Doubled is a type of its own'):
        plan_conversion(static)
    treat_as_plain(kind, doubled)
    net = copy.deepcopy(static)
    convert_to_kw_(net, groups=['0'])
    assert_same(net, static)
    state['0.scale'] = torch.tensor(3.0)
    static.load_state_dict(state)
    start_from_state_dict_(net, state)
    assert_same(net, static)


class Normed(nn.Linear):
    def forward(self, x):
        return F.linear(x, F.normalize(self.weight), self.bias)


def test_a_linear_type(forms):
    static = nn.Sequential(Normed(32, 16), nn.ReLU(), Linear(16, 16)).double()
    treat_as_plain(Normed, lambda layer: PlainConv.of(layer, weight=F.normalize(layer.weight)))
    net = copy.deepcopy(static)
    convert_to_kw_(net, groups=['*'], linear=True)
    assert isinstance(net[0], KWLinear) and isinstance(net[2], KWLinear)
    x = torch.randn(2, 5, 32).double()
    torch.testing.assert_close(net(x), static(x), rtol=1e-10, atol=1e-10)
    nn.init.normal_(static[0].weight)
    start_from_state_dict_(net, static.state_dict())
    torch.testing.assert_close(net(x), static(x), rtol=1e-10, atol=1e-10)


class Noisy(StdConv2d):
    """Derives from a known type, but computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


def test_a_subclass_of_a_known_type_stays_static(forms):
    net = nn.Sequential(nn.Conv2d(16, 32, 3), Noisy(32, 32, 3))
    plan = plan_conversion(net).plan
    reason = 'Noisy is a type of its own, which may compute something else'
    assert dict(plan.static) == {'1': reason}
    assert f'static, {reason}: 1' in str(plan)
    # A wrong declaration is an error. A form holds for exactly one type.
    treat_as_plain(Noisy, FORMS['timm.layers.std_conv.StdConv2d'])
    with pytest.raises(ValueError, match=r"form declared for Noisy must compute what layer '1' "
                       r'does \(see treat_as_plain; filter_fn .* outputs differ by .* of their'):
        plan_conversion(net)
    assert len(plan_conversion(net, filter_fn=lambda _, name: name != '1').plan.layers) == 1


@pytest.mark.parametrize('form, kind, message', [
    (lambda layer: layer.weight, TypeError, "layer '0'. must return a PlainConv, got Parameter"),
    (lambda layer: PlainConv.of(layer, weight=layer.weight[0]), ValueError,
     r'weight of an nn.Conv2d, got torch.Size\(\[16, 3, 3\]\)'),
    (lambda layer: PlainConv.of(layer, weight=None), ValueError, 'of an nn.Conv2d, got None'),
    (lambda layer: PlainConv.of(layer, pad_input=nn.BatchNorm2d(16)), ValueError,
     'without parameters and buffers as pad_input, or None, .* got BatchNorm2d'),
    (lambda layer: PlainConv.of(layer, pad_input=F.pad), ValueError, 'as pad_input, or None'),
    (lambda layer: PlainConv.of(layer, stride=2), ValueError,
     r"its output is of shape \(2, 16, 2, 2\), the layer's of \(2, 16, 8, 5\)"),
    (lambda layer: PlainConv.of(layer, padding='some'), ValueError, 'running both fails: '),
    (lambda layer: replace(doubled(layer), bias=None), ValueError, 'outputs differ by'),
    (lambda layer: replace(doubled(layer), weight=layer.weight * 2.002), ValueError,
     'outputs differ by 1.0e-03 of their norm'),
])
def test_wrong_forms_are_told_and_nothing_has_changed(forms, form, kind, message):
    net = nn.Sequential(Doubled(16, 16, 3), nn.ReLU())
    treat_as_plain(Doubled, form)
    with pytest.raises(kind, match=message):
        convert_to_kw_(net, groups=['0'])
    assert type(net[0]) is Doubled


def test_wrong_declarations_are_told(forms):
    with pytest.raises(TypeError, match=r"one of \['Conv1d', 'Conv2d', .*got .*ReLU"):
        treat_as_plain(nn.ReLU, doubled)
    with pytest.raises(TypeError, match='subclass must derive from .*got 3'):
        treat_as_plain(3)
    with pytest.raises(ValueError, match="a path like 'package.module.Class', got 'Doubled'"):
        treat_as_plain('Doubled', doubled)
    with pytest.raises(TypeError, match='form must be a function .* got 2'):
        treat_as_plain(Doubled, 2)
    # The type behind a path is not known yet.
    treat_as_plain('torch.nn.modules.conv.ConvTranspose2d', doubled)
    with pytest.raises(TypeError, match=r"ConvTranspose2d \(layer '0'\) is declared by its path, "
                       'but must derive from one of'):
        plan_conversion(nn.Sequential(nn.ConvTranspose2d(16, 16, 3)))


@pytest.mark.filterwarnings('ignore:std.*degrees of freedom:UserWarning')
def test_what_computes_nothing_finite_stays_static():
    # A single number has no standard deviation, and cells would be NaN.
    net = nn.Sequential(nn.Conv2d(16, 32, 3), ConvWS2d(32, 32, 1, groups=32))
    assert dict(plan_conversion(net, groups=['*']).plan.static) == {
        '1': 'its effective weight is not finite'}


def test_modules_with_a_state_inside_stay_static(forms):
    treat_as_plain(Doubled, doubled)
    odd = Doubled(16, 16, 3)
    odd.border = nn.BatchNorm2d(16)
    net = nn.Sequential(nn.Conv2d(16, 16, 3), odd)
    assert dict(plan_conversion(net, groups=['*']).plan.static) == {
        '1': 'it has modules with parameters or buffers inside'}


def test_random_numbers_are_left_alone():
    net = nn.Sequential(StdConv2d(16, 16, 3), nn.ReLU())
    torch.manual_seed(0)
    plan_conversion(net, groups=['0'])
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(0)))


def test_on_the_meta_device():
    with torch.device('meta'):
        net = nn.Sequential(*(make() for make in (LAYERS['timm std same'], LAYERS['mmcv ws'])))
    # On the meta device the form is not compared.
    assert len(convert_to_kw_(net, groups=['0', '1']).layers) == 2
