"""Checkpoints in the authors' layout: recognised, converted, refused, converted back."""
import functools
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import golden
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from kw_mm import (
    KWMobileNetV2,
    KWResNet,
    convert_official_checkpoint,
    to_official_checkpoint,
)
from kw_mm.models.official import recognise
from kw_mm.models.official.released import RELEASED

CONFIGS = Path(__file__).parents[2] / 'configs' / 'mask_rcnn'

THIN = dict(type='KWResNet', depth=18, base_channels=16, kw_cfg=dict(cell_num_ratio=2))
CONVNEXT = dict(type='KWConvNeXt', arch=dict(depths=(1, 1, 2, 1), channels=(8, 8, 16, 16)))
NECK = {'neck.conv.weight': torch.randn(4, 4), 'rpn_head.bias': torch.randn(3),
        'roi_head.bbox_head.fc_cls.bias': torch.randn(5)}
CLASSES = ('disk', 'square')


def build(config, device='cpu'):
    with torch.device(device):
        return MODELS.build(config)


def classifier(state, **heads):
    """A state dict of the authors' classifier: the backbone's with a head."""
    heads = heads or {'fc.weight': torch.randn(7, 16), 'fc.bias': torch.randn(7)}
    return OrderedDict({**state, **heads})


def prefixed(prefix, state):
    return {prefix + key: tensor for key, tensor in state.items()}


def assert_same(actual, expected):
    assert list(actual) == list(expected)
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype and torch.equal(actual[key], tensor), key


@pytest.fixture(scope='module', autouse=True)
def cached_builds():
    """Builds each backbone once, because most tests build the same ones."""
    @functools.cache
    def cached(text):
        return MODELS.build(eval(text))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recognise, 'MODELS', SimpleNamespace(build=lambda cfg: cached(repr(cfg))))
        yield


def convert(file, weights=None, backbone=THIN):
    """Converts a file of the thin network, or of a given one."""
    return convert_official_checkpoint(file, weights, backbone)


@pytest.fixture(scope='module')
def thin():
    """The state dict of a thin network, with values that all differ from initial ones."""
    torch.manual_seed(0)
    model = build(THIN)
    for tensor in model.state_dict().values():
        tensor.copy_(torch.rand(tensor.shape) * 9)
    return model.state_dict()


@pytest.fixture(scope='module')
def convnext():
    """The state dict of a thin ConvNeXt."""
    return build(CONVNEXT).state_dict()


# Recognition.

@pytest.mark.parametrize('model', RELEASED, ids=lambda model: model.name)
def test_released_models_are_recognised(model):
    state = build(model.backbone, 'meta').state_dict()
    converted, report = convert_official_checkpoint(dict(model=state))
    assert report.released is model and report.backbone == model.backbone
    assert list(converted['state_dict']) == list(prefixed('backbone.', state))
    assert model.budget in str(report) and f"type='{model.backbone['type']}'" in str(report)


def test_budgets_are_in_the_authors_words():
    assert [model.budget for model in RELEASED[:5]] == ['1/4x', '1/2x', '1x', '2x', '4x']


KW_CONFIGS = sorted(CONFIGS.glob('*_kw*_fpn_ms-adamw-1x_coco.py'))


def test_the_configs_named_are_those_there_are():
    assert [path.name for path in KW_CONFIGS] == sorted(
        Path(model.config).name for model in RELEASED if model.config)


@pytest.mark.parametrize('config', KW_CONFIGS, ids=lambda path: path.name)
def test_configs_are_found_by_what_they_build(config):
    backbone = Config.fromfile(config).model.backbone
    state = build(backbone, 'meta').state_dict()
    _, report = convert_official_checkpoint(prefixed('backbone.', state))
    assert report.config == f'configs/mask_rcnn/{config.name}'


@pytest.mark.parametrize('config', [
    dict(type='KWResNet', depth=34, base_channels=8, kw_cfg=dict(cell_num_ratio=0.3)),
    dict(type='KWResNet', depth=101, kw_cfg=dict(
        cell_num_ratio=0.25, cell_inplane_ratio=0.5, cell_outplane_ratio=0.25)),
    dict(type='KWResNet', depth=50, kw_cfg=dict(cell_num_ratio=1, attn_norm='LN')),
    dict(type='KWResNet', depth=50, kw_cfg=dict(cell_num_ratio=(1, 1, 0.5, 3), reduction=0.125)),
    dict(type='KWResNet', depth=50, kw_cfg=dict(cell_num_ratio=1.5)),
    dict(type='KWResNet', depth=18, kw_cfg=dict(
        cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5,
        nonlocal_basis_ratio=(1, 1, 0.5, 0.75))),
    dict(type='KWResNet', depth=18, base_channels=16, kw_cfg=dict(
        cell_num_ratio=0.5, spatial_partition=(True, True, True, False))),
    dict(type='KWConvNeXt', arch='small', kw_cfg=dict(cell_num_ratio=2)),
    dict(type='KWConvNeXt', arch='tiny', kw_cfg=dict(cell_num_ratio=1, attn_norm='BN1d')),
    dict(type='KWConvNeXt', arch=dict(depths=(1, 2, 1, 1), channels=(8, 24, 32, 40)),
         kw_cfg=dict(cell_num_ratio=1, cell_inplane_ratio=(1, 1, 1, 1, 1, 0.5, 1, 1, 1, 1, 1, 1))),
    dict(type='KWMobileNetV2', widen_factor=0.35, share_pointwise=True,
         kw_cfg=dict(cell_num_ratio=2)),
    dict(type='KWMobileNetV2', widen_factor=1.4, share_pointwise=False,
         static_pointwise_stages=(2, 3), kw_cfg=dict(cell_num_ratio=1)),
], ids=str)
def test_other_models_are_named_by_a_config(config):
    state = build(config, 'meta').state_dict()
    with pytest.raises(ValueError, match='one of the released models, or named by .*--config CONFIG'
                       '.*comes closest to kw'):
        convert_official_checkpoint(dict(model=state))
    converted, report = convert_official_checkpoint(dict(model=state), backbone=config)
    assert report.released is report.config is None
    assert report.backbone == config
    assert 'no released model' in str(report)
    # The file keeps the network's config.
    back, report = to_official_checkpoint(converted)
    assert list(back['model']) == list(state) and report.backbone == config


@pytest.mark.parametrize('config, message', [
    (dict(type='KWResNet', depth=18, static=True), 'must have one of our KW backbones'),
    (dict(type='KWConv2d', in_channels=16, out_channels=16, kernel_size=3),
     "one of our KW backbones, .'KWResNet', 'KWConvNeXt', 'KWMobileNetV2'., got"),
    (dict(THIN, base_channels=32),
     'must be that of the config; this one differs: misshapen warehouse_manager'),
    (dict(THIN, depth=34), r'this one differs: missing layer1\.2\.conv1\.attention'),
    (dict(THIN, kw_cfg=dict(cell_num_ratio=1)), 'misshapen warehouse_manager.weights.0')])
def test_a_config_of_another_network(thin, config, message):
    with pytest.raises(ValueError, match=message):
        convert_official_checkpoint(thin, backbone=config)


# Conversion and back.

@pytest.mark.parametrize('prefix', ['', 'module.'])
@pytest.mark.parametrize('container', ['model', 'model_ema', 'state_dict', None])
def test_containers_and_prefixes_and_back(thin, container, prefix):
    state = prefixed(prefix, classifier(thin))
    file = state if container is None else {container: state, 'epoch': 3, 'optimizer': {}}
    converted, report = convert(file)
    assert set(converted) == {'meta', 'state_dict'}
    assert_same(converted['state_dict'], prefixed('backbone.', thin))
    assert (report.kind, report.container, report.num_tensors) == ('classifier', container, 257)
    assert report.dropped == (f'{prefix}fc.weight', f'{prefix}fc.bias')
    assert report.left_out == (() if container is None else ('epoch', 'optimizer'))
    assert report.backbone == THIN
    MODELS.build(report.backbone).load_state_dict(
        {key[len('backbone.'):]: t for key, t in converted['state_dict'].items()}, strict=True)

    back, report = to_official_checkpoint(converted)
    assert_same(back if container is None else back[container], prefixed(prefix, thin))
    assert set(back) == ({container} if container else set(prefixed(prefix, thin)))
    assert report.to_official and report.container == container and not report.dropped


def test_the_average_is_taken_unless_told_otherwise(thin):
    other = {key: tensor + 1 for key, tensor in thin.items()}
    file = dict(model=classifier(thin), model_ema=classifier(other), args=None)
    converted, report = convert(file)
    assert_same(converted['state_dict'], prefixed('backbone.', other))
    assert "'model_ema', the moving average; the file also holds 'model'" in str(report)
    assert report.left_out == ('model', 'args')
    converted, report = convert(file, weights='model')
    assert_same(converted['state_dict'], prefixed('backbone.', thin))
    assert "weights   'model'; the file also holds 'model_ema'" in str(report)
    with pytest.raises(ValueError, match="one of what .* holds, model_ema, model, got 'ema'"):
        convert(file, weights='ema')
    with pytest.raises(ValueError, match="holds, nothing, got 'model'"):
        convert(thin, weights='model')
    # Without a moving average the entry is empty.
    assert convert(dict(file, model_ema=None))[1].container == 'model'


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_a_detector_and_back(thin, prefix):
    backbone = classifier(thin)  # the authors' detectors contain it too
    state = prefixed(prefix, {**prefixed('backbone.', backbone), **NECK})
    file = dict(meta=dict(CLASSES=CLASSES, PALETTE=[(1, 2, 3), (4, 5, 6)], epoch=12),
                state_dict=state, optimizer=dict(state={}))
    converted, report = convert(file)
    expected = {**prefixed('backbone.', thin), **NECK}
    assert_same(converted['state_dict'], expected)
    assert converted['meta']['dataset_meta'] == dict(classes=CLASSES,
                                                     palette=[(1, 2, 3), (4, 5, 6)])
    assert (report.kind, report.parts) == ('detector', ('neck', 'rpn_head', 'roi_head'))
    assert (report.num_tensors, report.num_backbone) == (260, 257)
    assert report.dropped == (f'{prefix}backbone.fc.weight', f'{prefix}backbone.fc.bias')
    assert 'neck, rpn_head, roi_head' in str(report)

    back, report = to_official_checkpoint(converted)
    assert back['meta'] == dict(CLASSES=CLASSES, PALETTE=[(1, 2, 3), (4, 5, 6)])
    assert set(back) == {'meta', 'state_dict'}
    assert_same(back['state_dict'], prefixed(prefix, expected))
    assert report.has_classes


def test_a_detector_without_class_names(thin):
    converted, report = convert(dict(state_dict={**prefixed('backbone.', thin), **NECK}))
    assert 'dataset_meta' not in converted['meta']
    assert 'classes   not named in the file' in str(report)


def test_norms_of_the_outputs_come_and_go(convnext):
    state = {key: tensor for key, tensor in convnext.items() if not key.startswith('norm')}
    heads = {'norm.weight': torch.ones(16), 'norm.bias': torch.ones(16),
             'head.weight': torch.ones(7, 16), 'head.bias': torch.ones(7)}
    converted, report = convert(dict(model=classifier(state, **heads)), backbone=CONVNEXT)
    norms = [f'norm{i}.{name}' for i in range(4) for name in ('weight', 'bias')]
    assert report.added == tuple(f'backbone.{name}' for name in norms)
    assert report.dropped == tuple(heads)
    assert 'added     norms of the outputs, 1 and 0' in str(report)
    for name in norms:
        value = converted['state_dict'][f'backbone.{name}']
        assert value.shape == convnext[name].shape
        assert torch.equal(value, torch.full_like(value, name.endswith('weight')))
    assert set(converted['state_dict']) == set(prefixed('backbone.', convnext))

    back, report = to_official_checkpoint(converted)
    assert_same(back['model'], state)
    assert report.dropped == tuple(f'backbone.{name}' for name in norms) and not report.kept
    assert 'norms of 1 and 0 added before' in str(report)
    converted['state_dict']['backbone.norm2.bias'] += 1
    back, report = to_official_checkpoint(converted)
    assert set(back['model']) == set(convnext) and not report.dropped
    assert report.kept == tuple(norms)
    assert 'no longer 1 and 0' in str(report)
    # Such a file can be read, too.
    again, report = convert(back, backbone=CONVNEXT)
    assert_same(again['state_dict'], converted['state_dict'])
    assert not report.added


def test_added_norms_have_the_dtype_of_the_rest(convnext):
    state = {key: tensor.half() for key, tensor in convnext.items() if not key.startswith('norm')}
    converted, _ = convert(state, backbone=CONVNEXT)
    assert {tensor.dtype for tensor in converted['state_dict'].values()} == {torch.half}


@pytest.mark.parametrize('lacking', ['norm2.weight', 'norm'])
def test_a_detector_must_have_its_norms(convnext, lacking):
    state = prefixed('backbone.', {k: t for k, t in convnext.items() if not k.startswith(lacking)})
    with pytest.raises(ValueError, match=r'missing backbone\.norm'):
        convert(dict(state_dict={**state, **NECK}), backbone=CONVNEXT)


def test_a_classifier_lacks_all_norms_or_none(convnext):
    state = {key: tensor for key, tensor in convnext.items() if key != 'norm1.bias'}
    with pytest.raises(ValueError, match=r'missing norm1\.bias \(8,\)$'):
        convert(state, backbone=CONVNEXT)


def test_a_dynamic_classifier_is_dropped_with_its_warehouse():
    state = {key: torch.zeros(shape, device='meta') for key, shape in golden.load(
        'kw_mobilenet_v2_100_1d2x')['state_dict'].items()}
    converted, report = convert_official_checkpoint(dict(model=state))
    assert report.name == 'kw1d2x-mobilenet-v2'
    assert report.dropped == tuple(
        key for key in state if key.startswith('classifier') or key.endswith('weights.9'))
    assert len(converted['state_dict']) + len(report.dropped) == len(state)


def test_what_was_trained_here_becomes_the_authors(thin):
    state = {**prefixed('backbone.', thin), **NECK}
    trained = dict(meta=dict(dataset_meta=dict(classes=CLASSES), epoch=1), state_dict=state,
                   ema_state_dict=prefixed('module.', state), message_hub={}, optimizer={})
    file, report = to_official_checkpoint(trained, THIN)
    assert list(file) == ['meta', 'state_dict'] and file['meta'] == dict(CLASSES=CLASSES)
    assert_same(file['state_dict'], state)
    assert report.left_out == ('ema_state_dict', 'message_hub', 'optimizer')
    file, _ = to_official_checkpoint(dict(state_dict=prefixed('backbone.', thin)), THIN)
    assert list(file) == ['model']
    assert_same(file['model'], thin)
    segmentor = dict(state_dict={**prefixed('backbone.', thin), 'decode_head.a': torch.ones(1)})
    assert to_official_checkpoint(segmentor, THIN)[1].kind == 'segmentor'


def test_the_converted_file_initialises_a_backbone(thin, tmp_path):
    converted, report = convert(dict(model=classifier(thin)))
    torch.save(converted, tmp_path / 'kw.pth')
    model = MODELS.build(dict(report.backbone, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'kw.pth'), prefix='backbone.')))
    model.init_weights()
    assert_same(model.state_dict(), thin)


# Errors name the culprit and nothing else.

def culprit(file, backbone=THIN):
    with pytest.raises(ValueError) as info:
        convert(file, backbone=backbone)
    return str(info.value)


def test_every_missing_tensor_is_named(thin):
    for key in list(thin)[::7]:
        state = {k: t for k, t in thin.items() if k != key}
        shape = tuple(thin[key].shape)
        assert culprit(dict(model=state)).endswith(f': missing {key} {shape}')


def test_every_misshapen_tensor_is_named(thin):
    for key in list(thin)[::7]:
        tensor = thin[key]
        other = torch.zeros(tensor.shape[0] + 1, *tensor.shape[1:]) if tensor.dim() else (
            torch.zeros(2))
        file = dict(state_dict={**prefixed('module.backbone.', {**thin, key: other}),
                                **prefixed('module.', NECK)})
        assert culprit(file).endswith(f': misshapen module.backbone.{key} {tuple(other.shape)} '
                                      f'instead of {tuple(tensor.shape)}')


@pytest.mark.parametrize('key', ['layer1.0.conv9.weight', 'layer4.9.bn1.weight', 'head.weight',
                                 'warehouse_manager.weights.4', 'relu'])
def test_every_unknown_tensor_is_named(thin, key):
    tensor = torch.zeros(2, 2, 1, 1, 1)
    assert culprit(dict(model={**thin, key: tensor})).endswith(f': unknown {key} (2, 2, 1, 1, 1)')


def test_released_models_name_their_culprits():
    for model in RELEASED[7:9]:  # ResNet50 at 4x, ConvNeXt
        state = build(model.backbone, 'meta').state_dict()
        key = list(state)[40]
        state[key] = state[key].unsqueeze(0)
        state['stray'] = state.pop('warehouse_manager.weights.1')
        message = culprit(state, None)
        assert f'comes closest to {model.name}: missing warehouse_manager.weights.1 ' in message
        assert '; unknown stray ' in message and f'; misshapen {key} ' in message


def test_cells_with_a_dimension_lost_are_no_classifier(thin):
    key = 'warehouse_manager.weights.2'
    assert culprit({**thin, key: thin[key][..., 0]}).endswith(
        f': misshapen {key} (94, 64, 64, 1) instead of (94, 64, 64, 1, 1)')


@pytest.mark.parametrize('name, lost', [
    ('kw1x-convnext-t', 'stages.2.4'), ('kw1x-convnext-t', 'stages.3'), ('kw1x-r50', 'layer2'),
    ('kw1x-mobilenet-v2-050', 'features.1'), ('kw1x-r18', 'layer1.1')])
def test_lost_blocks_are_told_from_other_architectures(name, lost):
    model = next(m for m in RELEASED if m.name == name)
    state = build(model.backbone, 'meta').state_dict()
    message = culprit({k: t for k, t in state.items() if not k.startswith(lost)}, None)
    assert f'closest to {name}: missing {lost}' in message and 'unknown' not in message


def test_many_culprits_are_counted(thin):
    state = {k: t for k, t in thin.items() if not k.startswith('layer2.1')}
    assert 'missing layer2.1.conv1.attention.fc1.weight (16, 32), ' in culprit(state)
    assert culprit(state).endswith(' and 18 more')


@pytest.mark.parametrize('file, message', [
    ([], 'must be a dict, got list'),
    ({}, 'must hold weights, under one of .* or directly; this one holds nothing'),
    (dict(state={}, param_groups=[]), 'this one holds state, param_groups'),
    (dict(model={}), 'this one holds model'),
    (dict(model=dict(a=1)), "weights must be tensors with names, got int under 'a'"),
    ({'a': torch.zeros(1), 'epoch': 1}, "got int under 'epoch'"),
    (dict(model={0: torch.zeros(1)}), 'weights must be tensors with names, got Tensor under 0'),
    (dict(model={'a.weight': torch.zeros(1)}), 'has none: a.weight$'),
    (dict(model={'blocks.0.attention.fc1.weight': torch.zeros(1)}),
     r"one of \['ResNet', 'ConvNeXt', 'MobileNetV2'\]; .* got blocks.0.attention.fc1.weight"),
])
def test_what_is_no_checkpoint_is_told(file, message):
    with pytest.raises((TypeError, ValueError), match=message):
        convert(file)


@pytest.mark.parametrize('model, name', [
    (KWResNet(18, base_channels=4, static=True), 'ResNet'),
    (KWMobileNetV2(0.1, static=True), 'MobileNetV2')])
def test_static_weights_are_told(model, name):
    assert f'has none, it looks like a static {name}' in culprit(dict(model=model.state_dict()))


def test_converting_twice_is_told(thin):
    converted, _ = convert(thin)
    assert 'converted already' in culprit(converted)


def test_errors_on_the_way_back(thin):
    def error(file):
        with pytest.raises((TypeError, ValueError)) as info:
            to_official_checkpoint(file, THIN)
        return str(info.value)

    assert "start with 'backbone.'" in error(dict(state_dict=thin))
    assert "got 'state_dict'" in error(dict(model=thin))
    assert 'must be a dict, got list' in error([])
    detector = prefixed('backbone.', classifier(thin))
    assert "not be in the authors' layout already" in error(dict(state_dict=detector))
    detector = prefixed('backbone.', {**thin, 'stray': torch.zeros(1)})
    assert 'unknown backbone.stray (1,)' in error(dict(state_dict=detector))
    for record in ([], dict(layout=dict(box=1), added=[]), dict(layout=dict(container='model'))):
        assert "meta['kw_mm'] must be" in error(
            dict(meta=dict(kw_mm=record), state_dict=prefixed('backbone.', thin)))


# With the authors' values.

HEADS = {'KWResNet': {}, 'KWMobileNetV2': {},  # golden values have them
         'KWConvNeXt': {'norm.weight': (768,), 'norm.bias': (768,), 'head.weight': (1000, 768),
                        'head.bias': (1000,)}}


@pytest.mark.parametrize('name, model_name, container', [
    ('kw_resnet18_1x', 'kw1x-r18', 'model_ema'),
    ('kw_resnet18_1d4x', 'kw1d4x-r18', None),
    ('kw_mobilenet_v2_100_1x', 'kw1x-mobilenet-v2', 'model'),
    ('kw_mobilenet_v2_100_1d2x', 'kw1d2x-mobilenet-v2', 'state_dict'),
    pytest.param('kw_resnet50_1x', 'kw1x-r50', 'model', marks=pytest.mark.slow),
    pytest.param('kw_resnet50_1d2x', 'kw1d2x-r50', 'model', marks=pytest.mark.slow),
    pytest.param('kw_convnext_tiny_1x', 'kw1x-convnext-t', 'model_ema', marks=pytest.mark.slow)])
def test_a_converted_file_computes_what_the_authors_compute(name, model_name, container):
    expected = golden.load(name)
    backbone = next(m.backbone for m in RELEASED if m.name == model_name)
    norms = {k: golden.value(k, v) for k, v in expected['state_dict'].items()
             if k.startswith('norm')}
    state = prefixed('module.', {
        k: golden.value(k, v) for k, v in {**expected['state_dict'], **HEADS[backbone['type']]}
        .items() if k not in norms})
    converted, report = convert_official_checkpoint(state if container is None else {
        container: state})
    assert report.name == model_name and report.dropped
    assert set(report.added) == set(prefixed('backbone.', norms))

    model = MODELS.build(report.backbone).double().eval()
    model.load_state_dict({k[len('backbone.'):]: t for k, t in converted['state_dict'].items()},
                          strict=True)
    with torch.no_grad():
        outputs = model(golden.image(expected['input_shape']))
    for i, (out, probe) in enumerate(zip(outputs, expected['eval']['0.0'], strict=True)):
        if norms:  # the golden outputs have norms that the file has not
            out = out * norms[f'norm{i}.weight'][:, None, None] + (
                norms[f'norm{i}.bias'][:, None, None])
        wanted = torch.tensor(probe['samples'], dtype=torch.float64)
        torch.testing.assert_close(golden.samples(out, len(wanted)), wanted, rtol=0,
                                   atol=1e-9 * wanted.abs().max().item())

    back, _ = to_official_checkpoint(converted)
    assert_same(back[container] if container else back,
                {k: t for k, t in state.items() if k not in report.dropped})


def test_published_models_have_names_of_their_own():
    assert len({model.name for model in RELEASED}) == len(RELEASED) == 15
    assert isinstance(MODELS.build(THIN), nn.Module)
