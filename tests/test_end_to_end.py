"""A user's whole job, in small: train, get killed, resume, test; and the demo."""
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch

from kw_mm import KWResNet
from kw_mm.datasets import write_shapes

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / 'configs' / 'demo' / 'mask-rcnn_kw1x-r18_fpn_shapes.py'
SEG_CONFIG = ROOT / 'configs' / 'demo' / 'fpn_kw1x-r18_shapes.py'

# Seconds after which a process counts as hanging. On a busy machine a run took more than 300.
PATIENCE = 1800


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('shapes'), num_train=16, num_val=4, size=64).root


def options(data):
    return ['--cfg-options', 'train_cfg.max_epochs=2', 'default_hooks.logger.interval=1',
            'train_dataloader.batch_size=4', 'model.backbone.base_channels=8',
            'model.backbone.drop_path_rate=0.2', 'model.neck.in_channels=[8,16,32,64]',
            f'train_dataloader.dataset.data_root={data}/',
            f'val_dataloader.dataset.data_root={data}/',
            f'test_dataloader.dataset.data_root={data}/',
            f'val_evaluator.ann_file={data}/annotations/instances_val.json',
            f'test_evaluator.ann_file={data}/annotations/instances_val.json']


def start(tool, config, *args):
    return subprocess.Popen([sys.executable, ROOT / 'tools' / tool, config, *map(str, args)],
                            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    return output


def losses(work_dir):
    """Losses of the second epoch in the log of the last process that wrote them."""
    found = {}
    for log in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            if entry.get('epoch') == 2 and 'loss' in entry:
                found[entry['iter']] = {k: v for k, v in entry.items() if 'time' not in k}
    return found


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(data, tmp_path):
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    weights, config = tmp_path / 'static.pth', tmp_path / 'config.py'
    static = KWResNet(18, base_channels=8, static=True, zero_init_residual=False)
    torch.save(static.state_dict(), weights)
    config.write_text(f'_base_ = {str(CONFIG)!r}\nmodel = dict(backbone=dict(init_cfg=dict('
                      f"_delete_=True, type='StaticPretrained', checkpoint={str(weights)!r})))\n")
    output = finish(start('train.py', config, '--work-dir', whole, *options(data)))
    assert f'KWResNet starts from the static weights of {weights}' in output

    process = start('train.py', config, '--work-dir', killed, *options(data))
    deadline = time.monotonic() + PATIENCE
    while not losses(killed):  # the second epoch has begun
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (killed / 'epoch_2.pth').exists()
    weights.unlink()  # a checkpoint has everything that is needed to resume
    time.sleep(1)  # names of logs contain the second
    output = finish(start('train.py', config, '--work-dir', killed, '--resume', *options(data)))
    assert 'epoch_1.pth' in output

    assert sorted(losses(whole)) == [5, 6, 7, 8]
    assert losses(killed) == losses(whole)
    output = finish(start('test.py', config, killed / 'epoch_2.pth', '--work-dir',
                          tmp_path / 'test', *options(data)))
    assert 'coco/segm_mAP' in output
    # "The testing results of the whole dataset is empty", and exit status 0.
    process = start('test.py', config, killed / 'epoch_2.pth', '--work-dir', tmp_path / 'static',
                    *options(data), 'model.backbone.init_cfg=None', 'model.backbone.static=True',
                    'model.backbone.kw_cfg=None')
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert 'checkpoint is that of a KW network and this one is static' in output


@pytest.mark.slow
@pytest.mark.parametrize('config, widths, kind, figure', [
    (CONFIG, [8, 16, 32, 64], 'Mask R-CNN', 'mask AP (0.50:0.95)'),
    (SEG_CONFIG, [8, 16, 32], 'Semantic FPN', 'mean IoU')])
def test_the_demo_trains_shows_and_is_not_repeated(config, widths, kind, figure, tmp_path, capsys,
                                                   monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location('demo', ROOT / 'tools' / 'demo.py')
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    small = tmp_path / 'small.py'
    small.write_text(f'_base_ = {str(config)!r}\n'
                     'model = dict(backbone=dict(base_channels=8), '
                     f'neck=dict(in_channels={widths}))\n')
    args = ['--config', str(small), '--data', str(tmp_path / 'shapes'), '--num-train', '8',
            '--num-val', '2', '--work-dir', str(tmp_path / 'demo'), '--epochs', '1']
    demo.main(args)
    first = capsys.readouterr().out
    assert figure in first
    pictures = list((tmp_path / 'demo' / 'pictures').glob('*.png'))
    assert len(pictures) == 2
    # Ground truth and predictions side by side.
    assert cv2.imread(str(pictures[0])).shape == (512, 1024, 3)
    checkpoint = tmp_path / 'demo' / 'epoch_1.pth'
    written = checkpoint.stat().st_mtime_ns
    demo.main(args)
    second = capsys.readouterr().out
    assert 'is trained already' in second
    assert checkpoint.stat().st_mtime_ns == written
    table = [text[text.index(f'KW {kind} on shapes'):] for text in (first, second)]
    assert table[0] == table[1]
