"""KWMobileNetV2: placement of its warehouses, stages, and mmdet's network as its static twin."""
import pytest
import torch
from mmdet.models.backbones import MobileNetV2
from mmseg.models.backbones import MobileNetV2 as SegMobileNetV2
from torch import nn

from kw_mm import KWMobileNetV2
from kw_mm.models.backbones.mobilenet_v2 import make_divisible


def keys(**kwargs):
    with torch.device('meta'):
        return [w.key for w in KWMobileNetV2(**kwargs).plan.warehouses]


def test_warehouses_in_the_order_of_first_use():
    assert keys()[:5] == ['stage0.stem', 'stage1.dwconv', 'stage1.pwconv', 'stage2.pwconv',
                          'stage2.dwconv']
    apart = keys(share_pointwise=False)
    assert apart[:6] == ['stage0.stem', 'stage1.dwconv', 'stage1.pwconv1', 'stage1.pwconv0',
                         'stage2.pwconv0', 'stage2.dwconv']
    assert len(keys()) == 13 and len(apart) == 19
    assert keys(share_pointwise=False, static_pointwise_stages=(1, 2, 3, 4, 5)) == [
        'stage0.stem', *(f'stage{i}.dwconv' for i in range(1, 6)), 'stage6.pwconv0',
        'stage6.dwconv', 'stage6.pwconv1']


def test_the_first_block_of_a_stage_belongs_to_the_stage_before():
    with torch.device('meta'):
        plan = KWMobileNetV2().plan
    owner = {name: plan.warehouses[layer.warehouse].key for name, layer in plan.layers.items()}
    assert owner['features.1.conv.1'] == owner['features.2.conv.2'] == 'stage1.pwconv'
    assert owner['features.4.conv.1.0'] == 'stage2.dwconv'
    assert owner['features.14.conv.0.0'] == 'stage5.pwconv'
    # The rows of 160 and 320 channels and the last layer are one stage.
    assert owner['features.17.conv.0.0'] == owner['features.18.0'] == 'stage6.pwconv'


@pytest.mark.parametrize('width', [0.5, 1.0, 1.4])
def test_the_static_twin_is_mmdets(width):
    torch.manual_seed(0)
    model = KWMobileNetV2(width, static=True, out_indices=(0, 1, 2, 3, 4)).double().eval()
    other = MobileNetV2(width, out_indices=(0, 1, 2, 4, 7)).double()
    other.eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight), nn.init.uniform_(norm.running_mean)
    # Other names in the same order.
    state = dict(zip(other.state_dict(), model.state_dict().values(), strict=True))
    other.load_state_dict(state)
    x = torch.randn(1, 3, 64, 96).double()
    for actual, expected in zip(model(x), other(x), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize('strides, dilations, output_stride', [
    ((1, 2, 2, 2, 1, 2, 1), (1, 1, 1, 1, 1, 1, 1), 32),
    ((1, 2, 2, 2, 1, 1, 1), (1, 1, 1, 1, 1, 2, 2), 16),
    ((1, 2, 2, 1, 1, 1, 1), (1, 1, 1, 2, 2, 4, 4), 8)])
def test_the_static_twin_is_mmsegs_dilated(strides, dilations, output_stride):
    torch.manual_seed(0)
    options = dict(strides=strides, dilations=dilations)
    model = KWMobileNetV2(0.5, static=True, last_layer=False, out_indices=(0, 1, 2, 3, 4),
                          **options).double().eval()
    other = SegMobileNetV2(0.5, out_indices=(0, 1, 2, 4, 6), **options).double()
    other.eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight), nn.init.uniform_(norm.running_mean)
    # Other names in the same order. The last layer does not run here and does not exist there.
    ours = [v for k, v in model.state_dict().items() if not k.startswith('features.18.')]
    other.load_state_dict(dict(zip(other.state_dict(), ours, strict=True)))
    x = torch.randn(1, 3, 64, 96).double()
    outputs = model(x)
    assert outputs[-1].shape[-1] == 96 // output_stride
    for actual, expected in zip(outputs, other(x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_dilation_changes_neither_keys_nor_plan():
    model = KWMobileNetV2(0.25)
    dilated = KWMobileNetV2(0.25, strides=(1, 2, 2, 1, 1, 1, 1), dilations=(1, 1, 1, 2, 2, 4, 4),
                            last_layer=False)
    assert str(dilated.plan) == str(model.plan)
    dilated.load_state_dict(model.state_dict())
    assert [out.shape[-1] for out in dilated(torch.randn(1, 3, 64, 64))] == [16, 8, 8, 8]
    idle = {n for n, p in dilated.named_parameters() if not p.requires_grad}
    assert idle == {n for n, _ in dilated.named_parameters() if n.startswith('features.18.')}


@pytest.mark.parametrize('value, rounded', [(8, 8), (1, 8), (11, 16), (12, 16), (18, 24), (19, 24),
                                            (20, 24), (48, 48), (45, 48)])
def test_channels_are_multiples_of_eight_and_not_far_below(value, rounded):
    assert make_divisible(value) == rounded


@pytest.mark.parametrize('frozen_stages, layers', [(-1, 0), (0, 2), (1, 4), (2, 7), (3, 14),
                                                   (4, 19)])
def test_frozen_stages(frozen_stages, layers):
    model = KWMobileNetV2(0.25, frozen_stages=frozen_stages).train()
    names = tuple(f'features.{i}.' for i in range(layers))
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith(names)}
    assert [layer.training for layer in model.features] == [
        i >= layers for i in range(len(model.features))]


def test_norms_keep_to_their_statistics():
    model = KWMobileNetV2(0.25, norm_eval=True).train()
    assert not any(m.training for m in model.modules()
                   if isinstance(m, nn.modules.batchnorm._BatchNorm))


def test_other_norms_and_activations():
    model = KWMobileNetV2(0.25, norm_cfg=dict(type='GN', num_groups=4),
                          act_cfg=dict(type='SiLU'))
    kinds = {type(m) for m in model.features.modules()}
    assert {nn.GroupNorm, nn.SiLU} <= kinds
    assert not {nn.BatchNorm2d, nn.ReLU6} & kinds


@pytest.mark.parametrize('kwargs, message', [
    (dict(widen_factor=0), 'widen_factor must be > 0, got 0'),
    (dict(static_pointwise_stages=(7,)), 'static_pointwise_stages must be one of .*got 7'),
    (dict(strides=(1, 2, 2)), r'strides must hold .* 7 rows of blocks, got \(1, 2, 2\)'),
    (dict(dilations=(1, 1, 1, 1, 1, 1, 0)), 'dilations must hold a positive integer'),
    (dict(static_pointwise_stages=(0,)), 'static_pointwise_stages must be one of .*got 0'),
])
def test_wrong_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        KWMobileNetV2(**kwargs)
