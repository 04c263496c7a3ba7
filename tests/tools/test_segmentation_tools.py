"""tools/train.py and tools/test.py with a segmentor: resumed, augmented, optimised, by windows."""
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import DefaultScope

from kw_mm.datasets import write_shapes

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / 'configs' / 'demo' / 'fpn_kw1x-r18_shapes.py')


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs a tool on a small data set and model, in this process or in several."""
    data = write_shapes(tmp_path / 'shapes', num_train=32, num_val=4, size=64).root
    options = ['model.backbone.base_channels=8', 'model.neck.in_channels=[8,16,32]',
               'default_hooks.logger.interval=1', 'train_dataloader.batch_size=16',
               *(f'{split}_dataloader.dataset.data_root={data}' for split in (
                   'train', 'val', 'test'))]
    monkeypatch.chdir(tmp_path)

    def run(tool, *argv, changes=(), num_processes=None):
        argv = [CONFIG, *map(str, argv), '--cfg-options', *options, *changes]
        if num_processes:
            done = subprocess.run(
                [sys.executable, '-m', 'torch.distributed.run', '--standalone',
                 f'--nproc_per_node={num_processes}', ROOT / f'tools/{tool}.py', *argv,
                 '--launcher', 'pytorch'], capture_output=True, text=True,
                env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'))
            assert done.returncode == 0, done.stderr[-3000:]
            return
        spec = importlib.util.spec_from_file_location(f'{tool}_tool', ROOT / f'tools/{tool}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with DefaultScope.overwrite_default_scope('mmengine'):
            module.main(argv)
    return run


def metrics(work_dir):
    """The metrics of the last test in a folder."""
    log = max(work_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime_ns)
    return json.loads(log.read_text().splitlines()[-1])


@pytest.mark.slow
def test_train_resume_and_test_in_every_way(run, tmp_path):
    work_dir = tmp_path / 'run'
    run('train', '--work-dir', work_dir, changes=['train_cfg.max_epochs=1'])
    run('train', '--work-dir', work_dir, '--resume', changes=['train_cfg.max_epochs=2'])
    checkpoint = work_dir / 'epoch_2.pth'
    trained = torch.load(checkpoint)
    meta = trained['meta']
    assert (meta['epoch'], meta['iter']) == (2, 4)
    assert meta['dataset_meta']['classes'][:2] == ('background', 'circle')
    # After four iterations all predictions are background, unless the classifier is replaced.
    torch.manual_seed(0)
    torch.nn.init.normal_(trained['state_dict']['decode_head.conv_seg.weight'])
    torch.nn.init.zeros_(trained['state_dict']['decode_head.conv_seg.bias'])
    torch.save(trained, checkpoint)

    found = {}
    for name, argv, changes in [
            ('plain', ['--out', tmp_path / 'maps'], []),
            ('augmented', ['--tta'], []),
            ('optimised', ['--optimize'], []),
            ('augmented and optimised', ['--tta', '--optimize'], []),
            ('one window', [], ['model.test_cfg.mode=slide', 'model.test_cfg.crop_size=[128,128]',
                                'model.test_cfg.stride=[128,128]']),
            ('windows', ['--show-dir', tmp_path / 'shown'], [
                'model.test_cfg.mode=slide', 'model.test_cfg.crop_size=[96,64]',
                'model.test_cfg.stride=[64,48]'])]:
        out = tmp_path / 'test' / name
        run('test', checkpoint, '--work-dir', out, *argv, changes=changes)
        found[name] = metrics(out)
        assert 0 < found[name]['mIoU'] < 100
        assert {'aAcc', 'mAcc'} < set(found[name])
    run('test', checkpoint, '--work-dir', tmp_path / 'test' / 'both', '--tta', '--optimize',
        num_processes=2)
    found['in two processes'] = metrics(tmp_path / 'test' / 'both')
    figures = {name: (result['mIoU'], result['aAcc']) for name, result in found.items()}
    # One window covers the images, which are enlarged to 128 px.
    assert figures['one window'] == figures['plain']
    assert figures['augmented'] != figures['plain'] != figures['windows']
    # Rounding errors may change single pixels.
    assert figures['optimised'] == pytest.approx(figures['plain'], abs=0.1)
    assert figures['augmented and optimised'] == pytest.approx(figures['augmented'], abs=0.1)
    assert figures['in two processes'] == pytest.approx(figures['augmented'], abs=0.1)

    maps = sorted((tmp_path / 'maps').iterdir())
    assert [path.name for path in maps] == [f'{i:06d}.png' for i in range(4)]
    labels = cv2.imread(str(maps[0]), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (64, 64) and np.max(labels) < 5
    # In the right folder, although the process has drawn pictures before.
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 4
    assert not list((tmp_path / 'test').rglob('*.png'))
