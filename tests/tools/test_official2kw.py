"""The command line that converts files of the authors' checkpoints."""
import argparse
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import golden
import numpy as np
import pytest
import torch
from mmdet.apis import init_detector
from mmdet.registry import MODELS as DETECTORS
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint

from kw_mm.checkpoint import read_checkpoint

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'model_converters' / 'official2kw.py'
BACKBONE = dict(type='KWResNet', depth=18, base_channels=16, kw_cfg=dict(cell_num_ratio=1))
CONFIG = ['--config', 'config.py']


@pytest.fixture(scope='module')
def tool():
    spec = importlib.util.spec_from_file_location('official2kw', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A working directory with a classifier as the authors' training code writes it."""
    monkeypatch.chdir(tmp_path)
    state = {**MODELS.build(BACKBONE).state_dict(), 'fc.weight': torch.ones(3, 128)}
    torch.save(dict(model=state, model_ema={k: t + 1 for k, t in state.items()}, epoch=3,
                    args=argparse.Namespace(lr=0.1)), 'src.pth')
    Path('config.py').write_text(f'model = dict(backbone={BACKBONE!r})')
    return tmp_path


@pytest.fixture
def error(tool, folder, capsys):
    """Runs the tool, which must fail and write nothing, and returns its last line."""
    def error(*argv):
        before = {file: file.stat() for file in folder.rglob('*')}
        with pytest.raises(SystemExit) as exit_:
            tool(argv)
        assert exit_.value.code == 2
        assert {file: file.stat() for file in folder.rglob('*')}.keys() == before.keys()
        return capsys.readouterr().err.splitlines()[-1]
    return error


def test_there_and_back(tool, capsys):
    tool(['src.pth', 'new/dst.pth', '--weights', 'model', *CONFIG])
    printed = capsys.readouterr().out
    assert "backbone=dict(type='KWResNet', depth=18, base_channels=16, kw_cfg=dict(" in printed
    assert 'written   new/dst.pth' in printed and 'dropped   the classifier: fc.weight' in printed
    assert 'left out  model_ema, epoch, args' in printed
    source = read_checkpoint('src.pth', allowed=[argparse.Namespace])['model']
    model = MODELS.build(dict(BACKBONE, init_cfg=dict(
        type='Pretrained', checkpoint='new/dst.pth', prefix='backbone.')))
    model.init_weights()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, source[key]), key

    tool(['--reverse', 'new/dst.pth', 'back.pth'])
    assert "in the authors' layout, 'model'" in capsys.readouterr().out
    back = read_checkpoint('back.pth')['model']
    assert set(source) - set(back) == {'fc.weight'}
    for key, tensor in back.items():
        assert torch.equal(tensor, source[key]), key


def test_the_average_by_default(tool, capsys):
    tool(['src.pth', 'dst.pth', *CONFIG])
    assert "weights   'model_ema', the moving average" in capsys.readouterr().out
    source = read_checkpoint('src.pth', allowed=[argparse.Namespace])['model_ema']
    written = read_checkpoint('dst.pth')['state_dict']
    assert torch.equal(written['backbone.conv1.weight'], source['conv1.weight'])


def test_errors(error, tool, folder):
    assert "'no.pth' does not exist" in error('no.pth', 'dst.pth')
    (folder / 'a.txt').write_text('text')
    assert "'a.txt' is cut off or no checkpoint" in error('a.txt', 'dst.pth')
    assert 'holds, model_ema, model, got' in error('src.pth', 'dst.pth', '--weights', 'x')
    assert 'does not go with --reverse' in error(
        'src.pth', 'dst.pth', '--reverse', '--weights', 'model')
    assert 'it is a folder' in error('src.pth', '.')
    assert "'a.txt' exists already; --force replaces it" in error('src.pth', 'a.txt')
    assert 'a.txt' in error('src.pth', 'a.txt/dst.pth', *CONFIG)
    torch.save(dict(state={}, param_groups=[]), 'optimizer.pth')
    assert 'holds state, param_groups' in error('optimizer.pth', 'new/dst.pth')
    assert "got 'state_dict'" in error('src.pth', 'dst.pth', '--reverse')
    assert 'or named by a config of its own (backbone=..., --config CONFIG)' in error(
        'src.pth', 'dst.pth')
    assert "config 'no.py' does not exist" in error('src.pth', 'dst.pth', '--config', 'no.py')
    tool(['src.pth', 'a.txt', '--force', *CONFIG])
    assert set(read_checkpoint('a.txt')) == {'meta', 'state_dict'}
    assert 'is converted already' in error('a.txt', 'dst.pth')


@pytest.mark.slow
def test_as_a_script(folder):
    done = subprocess.run([sys.executable, TOOL, 'src.pth', 'dst.pth', *CONFIG], text=True,
                          capture_output=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0 and (folder / 'dst.pth').is_file()
    assert done.stdout.startswith('found     classifier, KW-ResNet')


@pytest.mark.slow
def test_a_released_detector_becomes_one_of_mmdet_3(tool, folder, capsys):
    """A Mask R-CNN as MMDetection 2.x saved it, with the values of the golden backbone."""
    expected = golden.load('kw_resnet50_1x')
    config = ROOT / 'configs/mask_rcnn/mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py'
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = DETECTORS.build(Config.fromfile(config).model)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state.update({f'backbone.{key}': golden.value(key, shape)
                  for key, shape in expected['state_dict'].items()})
    classes = tuple(f'thing {i}' for i in range(80))
    torch.save(dict(
        meta=dict(CLASSES=classes, epoch=12, iter=np.int64(7), hook_msgs=dict(best=np.float64(1)),
                  config='model = dict()', mmdet_version='2.28.1'),
        state_dict=state, optimizer=dict(state={}, param_groups=[dict(lr=1e-4)])), 'src.pth')

    tool(['src.pth', 'dst.pth'])
    printed = capsys.readouterr().out
    assert f'config    {config.relative_to(ROOT)}' in printed
    assert 'backbone.fc.weight, backbone.fc.bias' in printed
    load_checkpoint(model, 'dst.pth', strict=True)  # like the runner's, which only logs differences
    detector = init_detector(str(config), 'dst.pth', device='cpu')
    assert detector.dataset_meta['classes'] == classes
    for key, tensor in detector.state_dict().items():
        assert torch.equal(tensor, state[key].to(tensor.dtype)), key
    with torch.no_grad():
        outputs = detector.backbone.double()(golden.image(expected['input_shape']))
    for out, probe in zip(outputs, expected['eval']['0.0'], strict=True):
        wanted = torch.tensor(probe['samples'], dtype=torch.float64)
        # The weights were converted to float32 in between.
        torch.testing.assert_close(golden.samples(out, len(wanted)), wanted, rtol=0,
                                   atol=1e-5 * wanted.abs().max().item())
