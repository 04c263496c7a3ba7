"""convert_to_kw_: what it converts, what it reports as static, and its errors."""
import copy
import io
import logging
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, weight_norm

import kw_mm
from kw_mm import KWConv1d, KWConv2d, KWLinear, convert_to_kw_, set_temperature
from kw_mm.convert import plan_conversion, treat_as_plain
from kw_mm.convert.forms import FORMS
from kw_mm.layers import Attention, WarehouseManager

MODULES = {
    # Thin or shallow, but with every kind of layer of the full networks.
    'regnet': (dict(type='RegNet', arch=dict(
        w0=24, wa=36, wm=2.5, group_w=8, depth=8, bot_mul=1.0)), False),
    'res2net': (dict(type='Res2Net', depth=50, scales=4, base_width=26, num_stages=2,
                     strides=(1, 2), dilations=(1, 1), out_indices=(0, 1)), False),
    'swin': (dict(type='SwinTransformer', embed_dims=32, depths=(2, 2), num_heads=(2, 4),
                  strides=(4, 2), out_indices=(0, 1), window_size=4), True),
    'mobilenet': (dict(type='MobileNetV2', out_indices=(2, 4)), False),
    'fpn': (dict(type='FPN', in_channels=[32, 64, 96], out_channels=32, num_outs=4), False),
}


def build(name):
    from mmdet.registry import MODELS
    torch.manual_seed(0)
    cfg, linear = MODULES[name]
    module = MODULES_CACHE.setdefault(name, MODELS.build(cfg))
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0, 0.2)
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
        elif isinstance(norm, (nn.LayerNorm, nn.Linear)) and norm.bias is not None:
            nn.init.normal_(norm.bias, 0, 0.2)
    module = copy.deepcopy(module).double()
    module.eval()
    return module, linear


MODULES_CACHE = {}


def inputs(name):
    if name == 'fpn':
        return [torch.randn(2, c, s, s).double() for c, s in ((32, 16), (64, 8), (96, 4))]
    return torch.randn(2, 3, 32, 32).double()


def relative(outputs, expected):
    return max(((a - b).norm() / b.norm()).item()
               for a, b in zip(outputs, expected, strict=True))


@pytest.mark.parametrize('name', MODULES)
def test_a_converted_module_computes_the_same_and_learns(name):
    module, linear = build(name)
    x = inputs(name)
    expected = module(x)
    keys = list(module.state_dict())
    plan = convert_to_kw_(module, linear=linear)
    assert plan.start.exact and len(plan.layers) > 3
    assert module.warehouse_manager.plan is plan
    for tau, bound in ((0, 1e-9), (0.3, 2e-2), (1, 2e-2)):
        set_temperature(module, tau)
        error = relative(module(x), expected)
        assert error < bound and (error > 1e-6) == (tau > 0)

    gone = {f'{n}.weight' for n in plan.layers} | {
        f'{n}.bias' for n in plan.layers if f'{n}.bias' in keys}
    new = re.compile(r'warehouse_manager|attention\.(fc1|fc2|norm1)|(\.conv|conv\d?)\.bias')
    assert {k for k in keys if k not in module.state_dict()} <= gone
    assert all(new.search(k) for k in module.state_dict() if k not in keys)
    assert [k for k in module.state_dict() if 'warehouse_manager' in k] == [
        f'warehouse_manager.weights.{i}' for i in range(len(plan.warehouses))]

    set_temperature(module, 0)
    for p in module.parameters():
        p.requires_grad_(True)
    optimizer = torch.optim.SGD(module.parameters(), 1e-3)
    start = {n: p.clone() for n, p in module.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        sum(out.square().mean() for out in module(x)).backward()
        optimizer.step()
    stuck = {n for n, p in module.named_parameters() if torch.equal(p, start[n])}
    # Layers behind the outputs do not run, in the static module either.
    idle = {n for n, p in module.named_parameters() if p.grad is None}
    assert stuck == idle and not any('attention' in n for n in stuck - {
        n for n in stuck if n.startswith(('layer5', 'layer6', 'layer7'))})


@pytest.mark.parametrize('name', MODULES)
def test_attention_is_bounded_and_every_layer_is_accounted_for(name):
    module, linear = build(name)
    plan = plan_conversion(module, dict(cell_num_ratio=2), linear=linear).plan
    types = (nn.Conv2d, nn.Linear) if linear else nn.Conv2d
    names = {n for n, m in module.named_modules() if isinstance(m, types)}
    assert {n for n, _ in plan.static} | set(plan.layers) == names
    for warehouse in plan.warehouses:
        attention = sum(layer.num_attention_parameters for layer in warehouse.layers)
        static = sum(layer.spec.num_static_parameters for layer in warehouse.layers)
        assert attention <= static or warehouse.layers[0].spec.groups > 1
    total = sum(m.weight.numel() for m in module.modules() if isinstance(m, types))
    assert plan.num_attention_parameters <= 2 * total
    assert {n for n, m in module.named_modules() if isinstance(m, types)} == names  # untouched


def grouping(module, **kwargs):
    plan = plan_conversion(module, **kwargs).plan
    return {w.key: [layer.spec.name for layer in w.layers] for w in plan.warehouses}, dict(
        plan.static)


def test_layers_of_one_stage_and_kind_share():
    module, _ = build('fpn')
    warehouses, static = grouping(module)
    assert warehouses == {
        'lateral_convs pointwise': [f'lateral_convs.{i}.conv' for i in range(3)],
        'fpn_convs spatial': [f'fpn_convs.{i}.conv' for i in range(3)]}
    assert static == {}


def test_swin_shares_the_mlps_of_a_stage():
    module, _ = build('swin')
    warehouses, static = grouping(module, linear=True)
    assert list(warehouses) == ['stages.0 linear', 'stages.1 linear']
    assert warehouses['stages.1 linear'] == [
        f'stages.1.blocks.{i}.ffn.layers.{j}' for i in range(2) for j in ('0.0', '1')]
    assert static['stages.0.blocks.0.attn.w_msa.qkv'] == 'linear layers inside an attention'
    assert 'fewer than 16' in static['patch_embed.projection']
    with pytest.raises(ValueError, match=r'nothing matched.*fewer than 16 .*patch_embed'):
        plan_conversion(module)


def test_odd_channels_split_a_stage():
    from mmdet.registry import MODELS
    # One warehouse for the pointwise layers of a Res2Net stage would have cells of 8x8.
    with torch.device('meta'):
        module = MODELS.build(dict(type='Res2Net', depth=50, scales=4, base_width=26))
    warehouses, static = grouping(module)
    assert warehouses['layer3 pointwise by 416x512'] == [
        f'layer3.{i}.conv1' for i in range(6)]
    assert warehouses['layer4 spatial'] == [
        f'layer4.{i}.convs.{j}' for i in range(3) for j in range(3)]
    halves = [w for w in warehouses if w.startswith('layer1 spatial of 26x26x3x3 from')]
    assert [len(warehouses[w]) for w in halves] == [2, 2, 2, 3]
    assert static['layer2.0.downsample.1'] == (
        'its kernel would be a single cell, with nothing to mix')


class Net(nn.Module):
    """Two stages, a shared layer, an MLP and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.layer1 = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
                                    nn.Conv2d(32, 32, 3, padding=1))
        self.layer2 = nn.Sequential(nn.Conv2d(32, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1))
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.layer2(self.layer1(self.stem(x))).mean((2, 3))
        return self.head(x + self.mlp(x))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().double().eval()


@pytest.fixture
def x():
    return torch.randn(2, 3, 8, 8).double()


def converted(module):
    return {n for n, m in module.named_modules() if isinstance(m, (KWConv1d, KWConv2d, KWLinear))
            and not n.endswith('.conv')}


def test_explicit_groups(net, x):
    expected = net(x)
    plan = convert_to_kw_(net, dict(cell_num_ratio=2), linear=True, groups=[
        'layer[12].*', dict(pattern=['mlp.*', 'head'], kw_cfg=dict(attn_norm='LN')),
        dict(pattern='stem', kw_cfg=dict(cell_num_ratio=1))])
    assert converted(net) == {'stem', 'layer1.0', 'layer1.2', 'layer2.0', 'layer2.2', 'mlp.0',
                              'mlp.2', 'head'}
    assert {w.key: (w.config.cell_num_ratio, w.config.attn_norm) for w in plan.warehouses} == {
        'group 2': (1, 'BN1d'), 'group 0': (2, 'BN1d'), 'group 1': (2, 'LN')}
    assert plan.layers['layer1.0'].warehouse == plan.layers['layer2.2'].warehouse
    assert (net(x) - expected).norm() / expected.norm() < 1e-9


def test_a_mapping_names_its_warehouses_and_the_rest_stays_static(net):
    plan = convert_to_kw_(net, groups=dict(body='layer*'))
    assert [w.key for w in plan.warehouses] == ['body']
    assert dict(plan.static) == {'stem': 'matched by no group'}
    assert 'static, matched by no group: stem' in str(plan)
    assert str(plan.start).count('exact') == 1


def test_filter_fn(net):
    asked = []

    def keep(module, name):
        asked.append((type(module), name))
        return name != 'layer1.2'

    plan = convert_to_kw_(net, filter_fn=keep)
    assert (nn.Conv2d, 'layer1.2') in asked and len(asked) == 5  # linear layers are no candidates
    assert dict(plan.static)['layer1.2'] == 'left out by filter_fn'
    assert type(net.layer1[2]) is nn.Conv2d


def test_device_dtype_mode_and_what_learns_are_kept(net, x):
    net.layer1.half()
    net.layer1.requires_grad_(False)
    net.layer2[2].train()
    net.layer2[2].weight.requires_grad = False
    plan = convert_to_kw_(net)
    assert [w.key for w in plan.warehouses] == [
        'layer1 spatial float16 cpu', 'layer2 pointwise float64 cpu']
    assert {p.dtype for p in net.layer1.parameters()} == {torch.float16}
    assert [w.dtype for w in net.warehouse_manager.weights] == [torch.float16, torch.float64]
    # Cells are frozen only if all of their layers are.
    assert [w.requires_grad for w in net.warehouse_manager.weights] == [False, True]
    assert not any(p.requires_grad for p in net.layer1.parameters())
    assert {n for n, p in net.layer2.named_parameters() if not p.requires_grad} == {
        n for n, _ in net.layer2.named_parameters() if n.startswith('2.attention')}
    assert net.layer2[2].attention.training and not net.layer2[0].attention.training
    assert not net.warehouse_manager.training
    with pytest.raises(ValueError, match=r"one dtype and device, .*float16 cpu.* in 'group 0'"):
        convert_to_kw_(Net().half().apply(
            lambda m: m.float() if isinstance(m, nn.Conv2d) and m.in_channels == 3 else None),
            groups=['*'])


def test_on_the_meta_device_it_plans_and_builds():
    with torch.device('meta'):
        net = Net()
    plan = convert_to_kw_(net)
    assert {p.device.type for p in net.parameters()} == {'meta'}
    assert len(plan.start.warehouses) == 2


def test_a_shared_layer_stays_shared(net, x):
    net.layer2[2] = net.layer2[0]
    expected = net(x)
    plan = convert_to_kw_(net, groups=['layer2.2'])  # its second place
    assert list(plan.layers) == ['layer2.0']
    assert net.layer2[0] is net.layer2[2] and isinstance(net.layer2[0], KWConv2d)
    torch.testing.assert_close(net(x), expected)


class Scaled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def replaced_forward(conv):
    conv.forward = lambda x: x
    return conv


def hooked(conv):
    conv.register_forward_hook(lambda *args: None)
    return conv


def buffered(conv):
    conv.register_buffer('mask', torch.ones(1))
    return conv


@pytest.mark.parametrize('layer, reason', [
    (lambda: Scaled(32, 32, 1), 'Scaled is a type of its own'),
    (lambda: nn.ConvTranspose2d(32, 32, 1), 'ConvTranspose2d is a transposed convolution'),
    (lambda: nn.LazyConv2d(32, 1), 'LazyConv2d has no shapes yet'),
    (lambda: parametrizations.spectral_norm(nn.Conv2d(32, 32, 1)), 'weight is parametrized'),
    (lambda: weight_norm(nn.Conv2d(32, 32, 1)), 'it has hooks'),
    (lambda: hooked(nn.Conv2d(32, 32, 1)), 'it has hooks'),
    (lambda: replaced_forward(nn.Conv2d(32, 32, 1)), 'its forward is replaced'),
    (lambda: buffered(nn.Conv2d(32, 32, 1)), 'other parameters or buffers'),
    (lambda: nn.Conv2d(32, 32, 1, dtype=torch.complex64), 'its weight is torch.complex64'),
])
@pytest.mark.filterwarnings('ignore:.*weight_norm.*:FutureWarning')
def test_layers_that_cannot_be_converted_are_listed(net, layer, reason):
    net.layer2[2] = odd = layer()
    plan = convert_to_kw_(net)
    assert net.layer2[2] is odd
    assert reason in dict(plan.static)['layer2.2']
    with pytest.raises(ValueError, match="'group 0' with .*layer2.2.* matches no .*it matches "
                                         r'layer2.2 \(.*' + reason):
        other = Net()
        other.layer2[2] = odd
        plan_conversion(other, groups=['layer2.2'])


def test_shared_parameters_and_hidden_references_stay_static(net):
    net.layer2[2].weight = net.layer2[0].weight
    net.stages = [net.layer1[0]]
    net.by_name = {'x': (net.layer1[2],)}
    plan = plan_conversion(net, groups=['stem'], linear=True).plan
    static = dict(plan.static)
    for name in ('layer2.0', 'layer2.2'):
        assert static[name] == 'a parameter of it belongs to another module, too'
    assert static['layer1.0'] == 'it is also held by stages, beside the module tree'
    assert static['layer1.2'] == 'it is also held by by_name, beside the module tree'


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn = nn.ModuleDict(dict(qkv=nn.Linear(32, 96), proj=nn.Linear(32, 32)))
        self.mha = nn.MultiheadAttention(32, 2)
        self.block = WindowMSA()
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))


class WindowMSA(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(32, 32)


def test_linear_layers_of_attentions():
    module = Attending()
    warehouses, static = grouping(module, linear=True)
    assert warehouses == {'mlp linear': ['mlp.0', 'mlp.1']}
    inside = 'linear layers inside an attention'
    assert static == {
        'self_attn.qkv': inside, 'self_attn.proj': inside, 'block.proj': inside,
        'mha.out_proj': 'NonDynamicallyQuantizableLinear is a type of its own, which may compute '
                        'something else'}
    # Layers that a group names are converted, except those whose forward is not called.
    warehouses, _ = grouping(module, linear=True, groups=['self_attn.*', 'block.proj'])
    assert warehouses == {'group 0': ['self_attn.qkv', 'self_attn.proj'],
                          'group 1': ['block.proj']}
    with pytest.raises(ValueError, match='mha.out_proj .NonDynamically'):
        plan_conversion(module, linear=True, groups=['mha.out_proj'])


def test_kw_layers_are_passed_over(net, x):
    convert_to_kw_(net.layer1, groups=['0'])
    outer = nn.ModuleDict(dict(net=net, kw=KWConv2d(16, 16, 3))).double()
    outer.forward = lambda x: outer['net'](x)
    holder = nn.Module()
    holder.inner, holder.kw = net, KWConv2d(16, 16, 3)
    plan = convert_to_kw_(holder, linear=True)
    assert 'inner.layer1.0' not in plan.layers and not any('attention' in n for n in plan.layers)
    assert dict(plan.static)['inner.layer1.2'] == 'inner.layer1 is a KW network already'
    assert net.layer1[0].manager is net.layer1.warehouse_manager
    # A group can name layers that an earlier conversion has left static.
    again = nn.Module()
    again.inner = Net()
    convert_to_kw_(again.inner.layer1, groups=['0'])
    assert 'inner.layer1.2' in convert_to_kw_(again, groups=['inner.layer1.2']).layers


def test_a_sequential_still_runs_with_its_manager_inside(x):
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)).double().eval()
    expected = net(x)
    convert_to_kw_(net)
    assert isinstance(net[-1], WarehouseManager)
    torch.testing.assert_close(net(x), expected)


class Named(nn.Conv2d):
    """A plain convolution under another name."""


def test_treat_as_plain(net):
    net.layer2[2] = Named(32, 32, 1).double()
    with pytest.raises(TypeError, match=r"one of \['Conv1d', 'Conv2d', .*got .*ReLU"):
        treat_as_plain(nn.ReLU)
    treat_as_plain(Named)
    treat_as_plain(Scaled)
    try:
        assert isinstance(convert_to_kw_(net) and net.layer2[2], KWConv2d)
        # A layer that computes something else is an error.
        other = Net()
        other.layer2[2] = Scaled(32, 32, 1)
        with pytest.raises(ValueError, match="declared for Scaled must compute what layer 'layer2"
                                             ".2' does .* outputs differ by 5.0e-01"):
            convert_to_kw_(other)
        other.layer2[2] = buffered(Named(32, 32, 1))
        assert 'other parameters or buffers' in dict(convert_to_kw_(other).static)['layer2.2']
    finally:
        del FORMS[Named], FORMS[Scaled]


def test_whole_kernels_share_by_kernel_size():
    net = nn.ModuleDict(dict(layer1=nn.Sequential(*(nn.Conv2d(96, 96, k) for k in (3, 3, 5, 5))),
                             conv=nn.Sequential(nn.Conv1d(32, 32, 3), nn.Conv3d(32, 32, 3))))
    owner = nn.Module()
    owner.net = net
    warehouses, _ = grouping(owner, kw_cfg=dict(spatial_partition=False))
    assert warehouses == {'net.layer1 spatial 3x3': ['net.layer1.0', 'net.layer1.1'],
                          'net.layer1 spatial 5x5': ['net.layer1.2', 'net.layer1.3']}
    warehouses, _ = grouping(owner)
    assert set(warehouses) == {'net.layer1 spatial', 'net.conv.0', 'net.conv.1'}


def test_ratios_may_be_one_for_each_warehouse(net):
    plan = convert_to_kw_(net, dict(cell_num_ratio=(1, 1.5), spatial_partition=(True, True)),
                          groups=['layer1.0', 'layer1.2'])
    assert [w.num_cells for w in plan.warehouses] == [9, 13]
    # Groups are found with the largest value, which splits layer1.
    with pytest.raises(ValueError, match='3 warehouses, got 2 entries'):
        convert_to_kw_(Net(), dict(cell_num_ratio=(1, 2)))
    # A ratio that cells of 32 channels do not allow leaves layers static, with the reason.
    with pytest.raises(ValueError, match='nothing matched.*cell_outplane_ratio must give cells'):
        convert_to_kw_(Net(), dict(cell_outplane_ratio=0.9))


def test_fewer_cells_than_mixtures(net, x, caplog):
    plan = convert_to_kw_(net, dict(cell_num_ratio=0.5))
    assert not plan.start.exact
    assert plan.start.warning in caplog.text  # which has what is at least a warning
    for start in plan.start.warehouses:
        assert 0 < start.optimum <= start.error * (1 + 1e-9) <= 1.01 * start.optimum


@pytest.mark.parametrize('duplicate', [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: _saved(m)])
def test_copies(net, x, duplicate):
    convert_to_kw_(net, linear=True)
    twin = duplicate(net)
    assert torch.equal(twin(x), net(x))
    assert twin.layer1[0].cells is twin.layer1[2].cells is twin.warehouse_manager.weights[0]
    twin.warehouse_manager.weights[0].data.zero_()
    assert net.layer1[0].cells.abs().sum() > 0
    assert str(twin.warehouse_manager.plan) == str(net.warehouse_manager.plan)


def _saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


def test_a_checkpoint_loads_strictly(net, x):
    convert_to_kw_(net, dict(cell_num_ratio=2))
    other = Net().double().eval()
    convert_to_kw_(other, dict(cell_num_ratio=2))
    assert not torch.equal(other(x), net(x))
    other.load_state_dict(net.state_dict(), strict=True)
    assert torch.equal(other(x), net(x))


def test_what_happened_is_logged(net, caplog):
    with caplog.at_level(logging.INFO, 'kw_mm'):
        convert_to_kw_(net)
    assert '2 layers' not in caplog.text and 'static, fewer than 16' in caplog.text
    assert 'optimum' in caplog.text
    odd = nn.ModuleDict(dict(a=nn.Conv2d(32, 32, 3), b=nn.Conv2d(27, 27, 3)))
    owner = nn.Module()
    owner.odd = odd
    plan_conversion(owner, groups=['*'])
    assert "the attention of 'group 0' has" in caplog.text
    assert 'make cells of (1, 1, 1, 1); split the group' in caplog.text


@pytest.mark.parametrize('module, message', [
    (lambda: nn.Conv2d(4, 4, 3), 'is itself a Conv2d.*KWConv2d.from_conv'),
    (lambda: Scaled(4, 4, 3), 'is itself a Scaled'),
    (lambda: nn.Linear(4, 4), 'is itself a Linear.*KWLinear.from_linear'),
    (lambda: KWConv2d(4, 4, 3), 'nothing matched: the module is itself a KWConv2d already'),
    (lambda: nn.ModuleList([nn.Conv2d(32, 32, 3)]), 'the owner of the ModuleList'),
    (lambda: nn.DataParallel(Net()), 'what the DataParallel wraps'),
    (lambda: kw_mm.KWResNet(18, base_channels=4), "attribute 'warehouse_manager' .*KWResNet"),
    (lambda: nn.ReLU(), 'nothing matched: the module has no layer to convert$'),
    (lambda: nn.Sequential(KWConv2d(16, 16, 3)), 'nothing matched'),
])
def test_odd_modules_are_told(module, message):
    with pytest.raises(ValueError, match=message):
        convert_to_kw_(module())


def test_a_second_conversion_is_told(net, x):
    convert_to_kw_(net, groups=['layer1.*'])
    with pytest.raises(ValueError, match='was converted before.*everything in one call'):
        convert_to_kw_(net)
    with pytest.raises(TypeError, match='module must be an nn.Module, got 3'):
        convert_to_kw_(3)


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(groups='layer1.*'), TypeError, 'a mapping or a sequence of groups, got'),
    (dict(groups=[]), ValueError, 'groups must not be empty'),
    (dict(groups=[dict(kw_cfg={})]), ValueError, "'group 0' of groups must be a glob"),
    (dict(groups=[dict(pattern='*', budget=1)]), ValueError, "'group 0' .*budget"),
    (dict(groups=dict(a=[1])), ValueError, "'a' of groups must be a glob"),
    (dict(groups=['layer1.*', 'layer7.*']), ValueError, r"'group 1' .*\['layer7.\*'\] matches no"),
    (dict(groups=['head']), ValueError, 'linear layers need linear=True'),
    (dict(groups=dict(a='layer1.*', b='*.0')), ValueError, r"\['a', 'b'\] all match 'layer1.0'"),
    (dict(groups=[dict(pattern='*', kw_cfg=dict(x=1))]), ValueError, r"unknown key\(s\) \['x'\]"),
    (dict(groups=['stem', 'layer*'], kw_cfg=dict(spatial_partition=False)), ValueError,
     'spatial_partition=False needs one kernel size'),
    (dict(kw_cfg=dict(cell_num_ratio='1x')), TypeError, 'cell_num_ratio must be'),
    (dict(groups=['*'], linear=True), ValueError, 'as many spatial dimensions'),
])
def test_wrong_arguments_are_told_and_nothing_has_changed(net, kwargs, error, message):
    before = list(net.state_dict())
    with pytest.raises(error, match=message):
        convert_to_kw_(net, **kwargs)
    assert list(net.state_dict()) == before
    assert not any(isinstance(m, Attention) for m in net.modules())
