"""KWResNet: placement of its warehouses, and its use in mmdet."""
import copy

import pytest
import torch
from mmdet.models.backbones import ResNet
from mmseg.models.backbones import ResNet as SegResNet
from mmseg.models.backbones import ResNetV1c
from torch import nn

from kw_mm import KWConv2d, KWResNet, set_temperature
from kw_mm.layers import Attention
from kw_mm.models.backbones import base


@pytest.fixture(scope='module')
def small():
    """A thin network with every kind of layer."""
    torch.manual_seed(0)
    return KWResNet(50, base_channels=8, kw_cfg=dict(cell_num_ratio=2))


def test_placement_and_hand_over(small):
    plan = small.plan
    owner = {name: layer.warehouse for name, layer in plan.layers.items()}
    static = {n for n, m in small.named_modules() if isinstance(m, nn.Conv2d)}
    assert static == {'conv1', 'layer1.0.conv1', 'layer1.0.downsample.0'}
    assert owner['layer1.0.conv2'] == owner['layer1.2.conv3'] == 0
    assert owner['layer2.0.conv1'] == owner['layer2.0.downsample.0'] == 0
    assert owner['layer2.0.conv2'] == owner['layer2.3.conv1'] == owner['layer3.0.conv1'] == 1
    assert owner['layer4.0.conv1'] == owner['layer4.0.downsample.0'] == 2
    basic = KWResNet(18, base_channels=4).plan.layers
    assert basic['layer1.0.conv1'].warehouse == 0


def test_dilation_and_avg_down_keep_the_hand_over():
    # The authors' code looks at the block's stride, which is 1 with dilation.
    model = KWResNet(50, base_channels=8, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4),
                     avg_down=True, deep_stem=True)
    layers = model.plan.layers
    assert layers['layer4.0.downsample.1'].warehouse == layers['layer4.0.conv1'].warehouse == 2
    assert model.layer4[1].conv2.dilation == (4, 4)
    shapes = [out.shape for out in model(torch.randn(1, 3, 64, 64))]
    assert [s[-1] for s in shapes] == [16, 8, 8, 8]


@pytest.mark.parametrize('kwargs', [
    dict(depth=18), dict(depth=50), dict(depth=50, deep_stem=True, avg_down=True),
    dict(depth=50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    dict(depth=34, num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1), out_indices=(0, 2),
         stem_channels=16)])
def test_at_temperature_one_it_is_mmdets_resnet(kwargs):
    """With one cell per mixture tau = 1 picks each kernel: the static network, value by value."""
    torch.manual_seed(0)
    model = KWResNet(**kwargs, base_channels=8).double().eval()
    static = ResNet(**kwargs, base_channels=8).double()
    static.eval()
    set_temperature(model, 1)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight), nn.init.uniform_(norm.running_mean)
    state = {k: v for k, v in model.state_dict().items()
             if 'attention' not in k and 'warehouse' not in k}
    x = torch.randn(2, 3, 64, 96).double()
    for name, layer in model.named_modules():
        if isinstance(layer, KWConv2d):
            state[f'{name}.weight'] = layer.kernel(
                torch.zeros(1, layer.in_channels, 1, 1).double())[0].detach()
    static.load_state_dict(state, strict=True)
    for actual, expected in zip(model(x), static(x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_frozen_stages_and_train_mode(small):
    model = KWResNet(50, base_channels=8, frozen_stages=1, norm_eval=False)
    assert model.train() is model
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters()
                      if n.startswith(('conv1', 'bn1', 'layer1'))}
    assert not model.layer1[1].conv2.attention.norm1.training
    assert model.layer2[0].bn1.training and model.layer2[0].conv2.attention.norm1.training
    model = KWResNet(50, base_channels=8, frozen_stages=2, freeze_cells=True)
    model.train()
    assert [w.requires_grad for w in model.warehouse_manager.weights] == [
        False, False, True, True]
    assert not any(m.training for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(m.norm1.training for m in model.modules() if isinstance(m, Attention))
    assert all(p.requires_grad for p in KWResNet(18, base_channels=4).parameters())


def test_norms_of_new_attentions_settle_where_norms_stay_in_evaluation(monkeypatch):
    # With norm_eval they kept mean 0 and variance 1 forever, so a third of the hidden units were 0
    # for all images or for none.
    monkeypatch.setattr('kw_mm.layers.attention.SETTLING_BATCHES', 3)
    torch.manual_seed(0)
    model = KWResNet(18, base_channels=8, frozen_stages=1, norm_eval=True).train()
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm1d)}
    images = torch.randn(4, 2, 3, 40, 40) * torch.rand(4, 2, 1, 1, 1)
    before = {name: copy.deepcopy(norm.state_dict()) for name, norm in norms.items()}
    model.eval()(images[0])
    model.train()
    for batch in images[:3]:
        model(batch)
    assert not any(norm.training for norm in norms.values())
    for name, norm in norms.items():
        seen = norm.num_batches_tracked.item()
        assert seen == (0 if name.startswith('layer1') else 3), name
        if not seen:
            assert norm.running_mean.eq(before[name]['running_mean']).all()
    settled = copy.deepcopy(model.state_dict())
    model.train()(images[3])
    other = KWResNet(18, base_channels=8, frozen_stages=1, norm_eval=True)
    other.load_state_dict(settled)
    other.train()(images[3])
    for network in (model, other):
        assert all(torch.equal(network.state_dict()[key], value)
                   for key, value in settled.items())
    hidden = []
    for norm in (norms['layer2.0.conv1.attention.norm1'], norms['layer4.1.conv2.attention.norm1']):
        norm.register_forward_hook(lambda module, args, out: hidden.append(out))
        for batch in images[:3]:
            model.eval()(batch)
        # The inputs of the second still changed while earlier norms were settling.
        assert 0.3 < torch.cat(hidden).std(0).mean() < 3
        hidden.clear()


def test_zero_init_residual_starts_as_the_shortcuts():
    block = KWResNet(50, base_channels=8).layer2[1]
    x = torch.rand(1, 64, 8, 8)
    assert torch.equal(block(x), x)
    assert KWResNet(18, base_channels=8, zero_init_residual=False).layer1[0].bn2.weight.sum() == 8


@pytest.mark.parametrize('frozen_stages, warnings', [(-1, 0), (1, 1)])
def test_freezing_random_weights_is_said(frozen_stages, warnings, monkeypatch):
    said = []
    monkeypatch.setattr(base, 'print_log', lambda message, **kwargs: said.append(message))
    KWResNet(18, base_channels=4, frozen_stages=frozen_stages).init_weights()
    assert len(said) == warnings
    assert all('stay at their random initial values' in message for message in said)


@pytest.mark.parametrize('kwargs', [
    dict(contract_dilation=True), dict(contract_dilation=True, multi_grid=(1, 2, 4)),
    dict(deep_stem=True, avg_down=True, contract_dilation=True)])
def test_the_static_twin_is_mmsegs_dilated_resnet(kwargs):
    torch.manual_seed(0)
    common = dict(depth=50, stem_channels=8, base_channels=8, strides=(1, 2, 1, 1),
                  dilations=(1, 1, 2, 4), **kwargs)
    model = KWResNet(**common, static=True).double().eval()
    other = SegResNet(**common).double()
    other.eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight), nn.init.uniform_(norm.running_mean)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 64, 96).double()
    for actual, expected in zip(model(x), other(x), strict=True):
        torch.testing.assert_close(actual, expected)
    dynamic = KWResNet(**common)
    assert [conv.dilation for conv in three_by_three(dynamic)] == [
        conv.dilation for conv in three_by_three(model)]


def test_the_static_twin_has_the_keys_of_mmsegs_resnet_v1c():
    common = dict(depth=50, stem_channels=8, base_channels=8)
    model, other = KWResNet(**common, deep_stem=True, static=True), ResNetV1c(**common)
    shapes = {k: v.shape for k, v in other.state_dict().items()}
    assert {k: v.shape for k, v in model.state_dict().items()} == shapes
    assert 'stem.6.weight' in shapes
    dynamic = KWResNet(**common, deep_stem=True).state_dict()
    assert all(dynamic[key].shape == shapes[key] for key in shapes if key.startswith('stem.'))


def three_by_three(model):
    return [m for m in model.modules()
            if isinstance(m, (nn.Conv2d, KWConv2d)) and m.kernel_size == (3, 3)]


@pytest.mark.parametrize('kwargs, error, message', [
    (dict(depth=35), ValueError, r'depth must be one of \[18, 34, 50, 101, 152\], got 35'),
    (dict(style='caffe'), ValueError, "style must be one of .*got 'caffe'"),
    (dict(frozen_stages=5), ValueError, 'frozen_stages must be one of .*got 5'),
    (dict(num_stages=5), ValueError, 'num_stages must be one of .*got 5'),
    (dict(out_indices=(0, 4)), ValueError, r'out_indices must be rising .* to 3, got \(0, 4\)'),
    (dict(out_indices=()), ValueError, r'out_indices must be rising'),
    (dict(strides=(1, 2)), ValueError, r'strides must hold .*4 stages, got \(1, 2\)'),
    (dict(dilations=(1, 1, 0, 1)), ValueError, 'dilations must hold a positive'),
    (dict(multi_grid=(1, 2)), ValueError, r'multi_grid must hold .*3 blocks .*got \(1, 2\)'),
    (dict(multi_grid=(1, 0, 1)), ValueError, 'multi_grid must hold a positive'),
    (dict(drop_path_rate=1), ValueError, r'drop_path_rate must be in \[0, 1\), got 1'),
    (dict(kw_cfg=dict(cell_num_ratio='4x')), TypeError, "cell_num_ratio must be .*got '4x'"),
    (dict(kw_cfg=dict(cell_num_ratio=(1, 2, 4))), ValueError, '4 warehouses, got 3 entries'),
    (dict(kw_cfg=dict(budget=1)), ValueError, r"unknown key\(s\) \['budget'\]"),
    (dict(init_cfg=dict(type='Pretrained', checkpoint='torchvision://resnet50')), ValueError,
     'init_cfg must not load static weights .*torchvision://resnet50'),
])
def test_wrong_arguments_are_told_at_construction(kwargs, error, message):
    with pytest.raises(error, match=message):
        KWResNet(**{**dict(depth=50, base_channels=8), **kwargs})


def test_print_shows_who_shares_what(small):
    assert 'warehouse=1, m=8, n=' in str(small)
    assert 'layer2.0.downsample.0' in str(small.plan)
