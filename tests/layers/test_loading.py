"""State dicts of other networks: KW layers and backbones are loaded completely or not at all.

They were once loaded as far as they fitted, which silently left layers random.
"""
import copy

import pytest
import torch
from torch import nn

from kw_mm import (
    KWConv2d,
    KWConvNeXt,
    KWLinear,
    KWMobileNetV2,
    KWResNet,
    convert_to_kw_,
    optimize_for_inference_,
)
from kw_mm.layers.loading import CheckpointMismatch

BACKBONES = dict(
    resnet=lambda **kwargs: KWResNet(18, base_channels=8, **kwargs),
    convnext=lambda **kwargs: KWConvNeXt(dict(depths=(1, 1), channels=(16, 32)),
                                         out_indices=(0, 1), **kwargs),
    mobilenet=lambda **kwargs: KWMobileNetV2(0.25, **kwargs))


class Detector(nn.Module):
    """A backbone and a head."""

    def __init__(self, backbone, classes=3):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Conv2d(8, classes, 1)


@pytest.fixture(params=BACKBONES)
def build(request):
    return BACKBONES[request.param]


STATIC = ('is that of a static network: convert .*static2kw.py, or start .*StaticPretrained')
SETTINGS = r'another budget, reduction or architecture: set kw_cfg \(cell_num_ratio, .*reduction'
OTHERS = dict(
    static=(dict(static=True), STATIC),
    reduction=(dict(kw_cfg=dict(reduction=0.75)), SETTINGS),
    budget=(dict(kw_cfg=dict(cell_num_ratio=2)), SETTINGS),
    norm=(dict(kw_cfg=dict(attn_norm='LN')), SETTINGS),
    basis=(dict(kw_cfg=dict(nonlocal_basis_ratio=0.5)), SETTINGS))


@pytest.mark.parametrize('prefix', ['', 'backbone.'])
@pytest.mark.parametrize('kind', OTHERS)
def test_another_network_is_refused(build, kind, prefix):
    kwargs, advice = OTHERS[kind]
    if kind == 'norm' and build is BACKBONES['convnext']:
        kwargs = dict(kw_cfg=dict(attn_norm='BN1d'))
    model, other = build(), build(**kwargs)
    if prefix:
        model, other = Detector(model), Detector(other)
    before = copy.deepcopy(model.state_dict())
    name = type(getattr(model, 'backbone', model)).__name__
    with pytest.raises(CheckpointMismatch, match=(
            f'^{prefix[:-1] or "the state dict"} of the checkpoint must be that of this {name}, '
            f'got keys [0-9]+ (missing|unknown|misshapen): {prefix}[a-z0-9_.]+.*{advice}')):
        model.load_state_dict(other.state_dict(), strict=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_kw_network_is_refused_by_its_static_twin(build):
    with pytest.raises(CheckpointMismatch, match='is that of a KW network and this one is static'):
        build(static=True).load_state_dict(build().state_dict(), strict=False)


def test_a_static_twin_of_another_depth_is_refused():
    # Every key of the smaller one fits.
    small, large = (KWResNet(depth, base_channels=8, static=True) for depth in (18, 34))
    with pytest.raises(CheckpointMismatch, match='missing: layer1.2.conv1.weight.*architecture'):
        large.load_state_dict(small.state_dict(), strict=False)
    with pytest.raises(CheckpointMismatch, match='unknown: layer1.2.conv1.weight.*architecture'):
        small.load_state_dict(large.state_dict(), strict=False)


def test_what_lies_deeper_in_a_file_is_told(build):
    with pytest.raises(CheckpointMismatch, match='unknown: model, epoch.*official2kw.py'):
        build().load_state_dict(dict(model=build().state_dict(), epoch=1), strict=False)


LAYERS = dict(
    conv=(lambda: nn.Conv2d(16, 16, 3), lambda **kw: KWConv2d(16, 16, 3, **kw)),
    linear=(lambda: nn.Linear(16, 16), lambda **kw: KWLinear(16, 16, **kw)),
    sequential=(lambda: nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16)),
                lambda **kw: nn.Sequential(KWConv2d(16, 16, 3, **kw), nn.BatchNorm2d(16))),
    inside_linear=(lambda: nn.Sequential(nn.Linear(16, 16)),
                   lambda **kw: nn.Sequential(KWLinear(16, 16, **kw))))


@pytest.mark.parametrize('kind', LAYERS)
def test_layers_by_themselves(kind):
    static, kw = LAYERS[kind]
    with pytest.raises(CheckpointMismatch, match=STATIC):
        kw().load_state_dict(static().state_dict(), strict=False)
    with pytest.raises(CheckpointMismatch, match=SETTINGS):
        kw().load_state_dict(kw(kw_cfg=dict(cell_num_ratio=2)).state_dict(), strict=False)
    for dropped in kw().state_dict():
        state = {key: value for key, value in kw().state_dict().items() if key != dropped}
        if 'num_batches_tracked' not in dropped and not dropped.startswith('1.'):
            with pytest.raises(CheckpointMismatch, match=f'1 missing: {dropped}'):
                kw().load_state_dict(state, strict=False)
    kw().load_state_dict(kw().state_dict())


def plain():
    return nn.Sequential(nn.Conv2d(16, 32, 3), nn.BatchNorm2d(32), nn.Conv2d(32, 32, 3),
                         nn.Conv2d(32, 16, 1))


@pytest.mark.parametrize('wrap', [nn.Sequential, lambda module: module])
def test_converted_modules(wrap):
    # KW layers in any network: the network's other keys are not checked.
    module = wrap(plain())
    convert_to_kw_(module)
    with pytest.raises(CheckpointMismatch, match=STATIC):
        module.load_state_dict(wrap(plain()).state_dict(), strict=False)
    other = wrap(plain())
    convert_to_kw_(other, dict(reduction=0.75))
    with pytest.raises(CheckpointMismatch, match=SETTINGS):
        module.load_state_dict(other.state_dict(), strict=False)
    state = module.state_dict()
    key = next(key for key in state if key.endswith('warehouse_manager.weights.0'))
    with pytest.raises(CheckpointMismatch, match='warehouse_manager of the checkpoint .*1 missing'):
        module.load_state_dict({k: v for k, v in state.items() if k != key}
                               | {key[:-1] + '9': state[key]}, strict=False)
    norm = next(key for key in state if key.endswith('1.running_mean') and 'attention' not in key)
    found = module.load_state_dict({k: v for k, v in state.items() if k != norm}, strict=False)
    assert found.missing_keys == [norm]


def test_a_part_of_a_model_may_be_loaded(build):
    model = Detector(build())
    head = {key: value + 1 for key, value in model.state_dict().items() if 'head' in key}
    found = model.load_state_dict(head, strict=False)
    assert torch.equal(model.head.weight, head['head.weight'])
    assert not found.unexpected_keys
    assert all(key.startswith('backbone.') for key in found.missing_keys)
    model.load_state_dict({}, strict=False)


def test_what_files_may_lack_or_have(build):
    # Counters, which old files lack; classifiers; norms of outputs that the other network lacks.
    model = build()
    state = {key: value for key, value in build().state_dict().items()
             if 'num_batches_tracked' not in key and not key.startswith(('norm0', 'norm1'))}
    extras = {name: torch.zeros(3) for name in ('fc.weight', 'head.fc.bias', 'classifier.1.bias')}
    found = model.load_state_dict({**state, **extras}, strict=False)
    assert sorted(found.unexpected_keys) == sorted(extras)
    key = next(iter(state))
    assert torch.equal(model.state_dict()[key], state[key])


def test_hooks_that_rename_keys_come_first(build):
    def rename(module, state_dict, prefix, *args):
        for key in list(state_dict):
            if key.startswith(f'{prefix}old_'):
                state_dict[prefix + key[len(prefix) + 4:]] = state_dict.pop(key)

    model = Detector(build())
    model.backbone.register_load_state_dict_pre_hook(rename)
    state = {f'backbone.old_{key}': value for key, value in build().state_dict().items()}
    assert not model.load_state_dict(state, strict=False).unexpected_keys


def test_wrappers_that_rename_keys_are_left_to_themselves(build):
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    model, other = build(), build()
    name, child = next((name, child) for name, child in model.named_children()
                       if any('attention' in key for key in child.state_dict()))
    setattr(model, name, checkpoint_wrapper(child))
    model.load_state_dict(other.state_dict())
    with pytest.raises(CheckpointMismatch, match=STATIC):
        model.load_state_dict(build(static=True).state_dict(), strict=False)


def test_optimised_models(build):
    model, twin = build(), build().eval()
    optimize_for_inference_(twin)
    with pytest.raises(ValueError, match='load.* before optimize_for_inference_'):
        twin.load_state_dict(model.state_dict(), strict=False)
    with pytest.raises(CheckpointMismatch, match='of a model optimized for inference'):
        model.load_state_dict(twin.state_dict(), strict=False)
    twin.load_state_dict(copy.deepcopy(twin).state_dict())


def test_strict_loading_names_the_same(build):
    with pytest.raises(CheckpointMismatch, match=STATIC):
        build().load_state_dict(build(static=True).state_dict())
