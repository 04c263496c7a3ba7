"""static2kw: turns the checkpoint of a static detector into one of its KW counterpart."""
import importlib.util
import re
from functools import partial
from pathlib import Path

import mmcv
import numpy as np
import pytest
import torch
from mmcv.cnn import ConvAWS2d
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from kw_mm import KWMobileNetV2
from kw_mm.models.class_layers import find_class_layers

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location(
    'static2kw', ROOT / 'tools/model_converters/static2kw.py')
static2kw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(static2kw)

HEAD = """
default_scope = 'mmdet'
neck = dict(type='FPN', in_channels=[32, 64, 128, 256], out_channels=32, num_outs=5)
"""
MODEL = """
model = dict(
    type='RetinaNet', data_preprocessor=dict(type='DetDataPreprocessor'),
    backbone=dict({backbone}, depth=50, base_channels=8), neck={neck},
    bbox_head=dict(
        type='RetinaHead', num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1,
        anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=1,
                              ratios=[1.0], strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type='DeltaXYWHBBoxCoder'){head}))
"""


@pytest.fixture
def files(tmp_path):
    """A static detector, its checkpoint and the config of a KW one."""
    static, kw = tmp_path / 'static.py', tmp_path / 'kw.py'
    static.write_text(HEAD + MODEL.format(backbone="type='ResNet'", neck='neck', head=''))
    kw.write_text(HEAD + MODEL.format(
        backbone="type='KWResNet'", neck="dict(type='KWConverted', module=neck)",
        head=", conv_cfg=dict(type='KWConv2d')"))
    model = build(static)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    meta = dict(dataset_meta=dict(CLASSES=('a', 'b', 'c')), cfg='...', epoch=12)
    torch.save(dict(state_dict=model.state_dict(), meta=meta, optimizer={}), tmp_path / 'src.pth')
    return model, kw, tmp_path / 'src.pth', tmp_path / 'out/dst.pth'


def build(path):
    cfg = Config.fromfile(path)
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.eval()
    return model


def outputs(model):
    torch.manual_seed(1)
    features = model.extract_feat(torch.randn(1, 3, 64, 64))
    return [*features, *(out for outs in model.bbox_head(features) for out in outs)]


def test_the_kw_detector_starts_as_the_static_one(files, capsys):
    static, config, src, dst = files
    static2kw.main([str(config), str(src), str(dst)])
    checkpoint = torch.load(dst, weights_only=True)
    assert checkpoint['meta'] == dict(dataset_meta=dict(CLASSES=('a', 'b', 'c')))
    model = build(config)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
    assert {'backbone', 'neck'} <= {k.partition('.')[0] for k in checkpoint['state_dict']
                                    if 'warehouse_manager' in k}
    for actual, expected in zip(outputs(model), outputs(static), strict=True):
        assert (actual - expected).norm() < 1e-3 * expected.norm()
    out = capsys.readouterr().out
    assert 'exact' in out and f'written to {dst}' in out


def test_weights_that_are_stored_otherwise(tmp_path, capsys):
    # A standardised weight is stored before that, with its new mean and scale.
    conv = dict(type='ConvAWS')
    backbone = f"type='ResNet', conv_cfg={conv}"
    static, kw = tmp_path / 'static.py', tmp_path / 'kw.py'
    static.write_text(HEAD + MODEL.format(backbone=backbone, neck='neck', head=''))
    kw.write_text(HEAD + MODEL.format(backbone=f"type='KWConverted', module=dict({backbone}",
                                      neck='neck', head='').replace('base_channels=8',
                                                                    'base_channels=8)'))
    model = build(static)
    for layer in model.modules():
        if isinstance(layer, ConvAWS2d):
            nn.init.uniform_(layer.weight_gamma, 0.01, 0.1)
    torch.save(model.state_dict(), tmp_path / 'src.pth')
    static2kw.main([str(kw), str(tmp_path / 'src.pth'), str(tmp_path / 'dst.pth')])
    converted = build(kw)
    assert not any(isinstance(layer, ConvAWS2d) for layer in converted.backbone.layer3.modules())
    converted.load_state_dict(torch.load(tmp_path / 'dst.pth')['state_dict'], strict=True)
    for actual, expected in zip(outputs(converted), outputs(model), strict=True):
        assert (actual - expected).norm() < 1e-3 * expected.norm()


@pytest.mark.parametrize('change, message', [
    (lambda state: state.pop('neck.lateral_convs.0.conv.weight'),
     '1 missing: neck.lateral_convs.0.conv.weight'),
    (lambda state: state.update({'mask.weight': torch.zeros(1)}), '1 unknown: mask.weight'),
    (lambda state: state.update({'backbone.conv1.weight': torch.zeros(1)}),
     r'1 misshapen: backbone.conv1.weight \(1,\) for \(8, 3, 7, 7\)'),
])
def test_wrong_keys_are_told_by_name(files, capsys, change, message):
    _, config, src, dst = files
    checkpoint = torch.load(src)
    change(checkpoint['state_dict'])
    torch.save(checkpoint, src)
    with pytest.raises(SystemExit):
        static2kw.main([str(config), str(src), str(dst)])
    assert re.search(message, capsys.readouterr().err)
    assert not dst.exists()


def test_other_errors(files, capsys, tmp_path):
    _, config, src, dst = files

    def error(*args):
        with pytest.raises(SystemExit):
            static2kw.main([str(arg) for arg in args])
        return capsys.readouterr().err

    assert 'does not exist' in error(tmp_path / 'no.py', src, dst)
    assert 'no.pth' in error(config, tmp_path / 'no.pth', dst)
    assert 'no layer of its model is' in error(tmp_path / 'static.py', src, dst)
    assert 'must be a file to write' in error(config, src, tmp_path)
    dst.parent.mkdir()
    dst.write_text('mine')
    assert '--force replaces it' in error(config, src, dst)
    static2kw.main([str(config), str(src), str(dst), '--force'])
    assert torch.load(dst)['state_dict']


def with_classes(path, num):
    other = path.with_name(f'{path.stem}_{num}.py')
    other.write_text(path.read_text().replace('num_classes=3', f'num_classes={num}'))
    return other


def test_another_number_of_classes(files, caplog):
    static, config, src, dst = files
    config = with_classes(config, 7)
    static2kw.main([str(config), str(src), str(dst)])
    assert 'left out, and to be trained from the start, are bbox_head.retina_cls' in caplog.text
    checkpoint = torch.load(dst, weights_only=True)
    assert checkpoint['meta'] == {}  # its names of classes would be wrong
    model = build(config)
    result = model.load_state_dict(checkpoint['state_dict'], strict=False)
    assert result.missing_keys == ['bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias']
    assert not result.unexpected_keys
    for actual, expected in zip(outputs(model)[:5], outputs(static)[:5], strict=True):
        assert (actual - expected).norm() < 1e-3 * expected.norm()


BACKBONE = """
default_scope = 'mmdet'
model = dict(
    type='RetinaNet', data_preprocessor=dict(type='DetDataPreprocessor', mean=[0], std=[255]),
    neck=None,
    backbone=dict(type='KWMobileNetV2', widen_factor=0.25, kw_cfg=dict(cell_num_ratio={budget})),
    bbox_head=dict(type='RetinaHead', num_classes=3, in_channels=8))
"""


@pytest.fixture
def backbone_files(tmp_path):
    """Configs with budgets of 1/2 and 1, static ImageNet weights, and a folder of images."""
    configs = [tmp_path / 'half.py', tmp_path / 'one.py']
    for path, budget in zip(configs, (0.5, 1)):
        path.write_text(BACKBONE.format(budget=budget))
    torch.manual_seed(0)
    static = KWMobileNetV2(widen_factor=0.25, static=True)
    torch.save({**static.state_dict(), 'classifier.1.weight': torch.ones(9, 1280)},
               tmp_path / 'src.pth')
    for i in range(3):
        mmcv.imwrite(np.random.default_rng(i).integers(0, 255, (64, 64, 3)).astype(np.uint8),
                     str(tmp_path / f'images/{i}.png'))
    return *configs, tmp_path / 'src.pth', tmp_path / 'images', tmp_path / 'out/dst.pth'


def run(*args):
    static2kw.main([str(arg) for arg in args])


def test_a_backbone_of_few_cells_is_fitted_to_images(backbone_files, capsys, monkeypatch):
    half, _, src, images, dst = backbone_files
    monkeypatch.setattr(static2kw, 'ImageFit', partial(static2kw.ImageFit, size=32, batch_size=2))
    run(half, src, dst, '--backbone')
    start = torch.load(dst)['state_dict']
    assert 'Nothing is left of what the static network predicts' in capsys.readouterr().out
    run(half, src, dst, '--backbone', '--images', images, '--steps', 2, '--force')
    out = capsys.readouterr().out
    assert 'fits to 2 images' in out and 'step 2 of 2' in out and 'fitted in 2 steps' in out
    fitted = torch.load(dst, weights_only=True)['state_dict']
    model = build(half)
    result = model.load_state_dict(fitted, strict=False)
    assert not result.unexpected_keys
    assert not any(key.startswith('backbone') for key in result.missing_keys)
    assert {key for key, value in fitted.items() if not torch.equal(value, start[key])} >= {
        'backbone.warehouse_manager.weights.0', 'backbone.features.0.0.attention.fc2.bias',
        'backbone.features.0.1.weight', 'backbone.features.0.1.running_mean'}


def test_what_cannot_be_fitted_is_told(backbone_files, capsys, tmp_path):
    half, one, src, images, dst = backbone_files

    def error(config, *more):
        with pytest.raises(SystemExit):
            run(config, src, dst, '--backbone', *more)
        assert not dst.exists()
        return capsys.readouterr().err

    assert 'with b >= 1 the start is exact' in error(one, '--images', images)
    assert 'does not exist' in error(half, '--images', tmp_path / 'nowhere')
    (tmp_path / 'empty').mkdir()
    assert 'must have images in it' in error(half, '--images', tmp_path / 'empty')
    assert 'steps must be a positive' in error(half, '--images', images, '--steps', 0)
    assert 'minutes must be > 0' in error(half, '--images', images, '--minutes', 0)


@pytest.mark.parametrize('own, given, found', [
    # Softmax over classes and background, and a box for each class.
    (dict(cls=(5, 8), reg=(16, 8)), dict(cls=(81, 8), reg=(320, 8)), ['cls', 'reg']),
    (dict(cls=(12, 8, 1, 1)), dict(cls=(240, 8, 1, 1)), ['cls']),
    # No number of classes explains both sizes.
    (dict(cls=(5, 8), reg=(16, 8)), dict(cls=(81, 8), reg=(324, 8)), []),
    # Other differences: a width, and a part of the backbone.
    (dict(cls=(5, 8)), dict(cls=(81, 16)), []),
    ({'cls': (5, 8), 'backbone.fc': (4, 8)}, {'cls': (81, 8), 'backbone.fc': (80, 8)}, []),
    (dict(cls=(7, 8)), dict(cls=(81, 8)), []),
    (dict(cls=(5, 8)), dict(cls=(5, 8)), [])])
def test_what_counts_classes(own, given, found):
    state = {key: torch.zeros(shape) for key, shape in given.items()}
    assert find_class_layers(own, state, dict(heads=[dict(num_classes=4)])) == found
