"""The main job as a user does it, in small: train, die, resume, test; and the demo."""
import json
import signal
import time
from types import SimpleNamespace

import cv2
import pytest
import torch
from forks import PATIENCE, ROOT, finish, load_tool, run_ranks, start_tool
from mmdet.utils import register_all_modules

from kw_mm import KWResNet
from kw_mm.datasets import write_shapes
from kw_mm.engine import local_training

CONFIG = ROOT / 'configs' / 'demo' / 'mask-rcnn_kw1x-r18_fpn_shapes.py'
SEG_CONFIG = ROOT / 'configs' / 'demo' / 'fpn_kw1x-r18_shapes.py'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    # Once here, not in each child.
    register_all_modules(init_default_scope=False)
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
    log = tmp_path / 'output.txt'
    output = finish(start_tool('train.py', config, '--work-dir', whole, *options(data), log=log),
                    log)
    assert f'KWResNet starts from the static weights of {weights}' in output

    process = start_tool('train.py', config, '--work-dir', killed, *options(data), log=log)
    deadline = time.monotonic() + PATIENCE
    while not losses(killed):  # the second epoch has begun
        assert process.is_alive(), log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (killed / 'epoch_2.pth').exists()
    weights.unlink()  # a checkpoint has everything that it takes to go on
    time.sleep(1)  # logs are told apart by the second
    output = finish(start_tool('train.py', config, '--work-dir', killed, '--resume',
                               *options(data), log=log), log)
    assert 'epoch_1.pth' in output

    assert sorted(losses(whole)) == [5, 6, 7, 8]
    assert losses(killed) == losses(whole)
    output = finish(start_tool('test.py', config, killed / 'epoch_2.pth', '--work-dir',
                               tmp_path / 'test', *options(data), log=log), log)
    assert 'coco/segm_mAP' in output
    # The tool advised to build the model without its mask head, and then refused the checkpoint.
    output = finish(start_tool('test.py', config, killed / 'epoch_2.pth', '--tta', '--optimize',
                               '--work-dir', tmp_path / 'tta', *options(data), log=log), log)
    assert 'Boxes alone are tested' in output and 'coco/bbox_mAP' in output
    assert 'coco/segm_mAP' not in output
    # "The testing results of the whole dataset is empty", and exit status 0.
    output = finish(start_tool(
        'test.py', config, killed / 'epoch_2.pth', '--work-dir', tmp_path / 'static',
        *options(data), 'model.backbone.init_cfg=None', 'model.backbone.static=True',
        'model.backbone.kw_cfg=None', log=log), log, status=2)
    assert 'checkpoint is that of a KW network and this one is static' in output


@pytest.mark.slow
@pytest.mark.parametrize('config, widths, kind, figure', [
    (CONFIG, [8, 16, 32, 64], 'Mask R-CNN', 'mask AP (0.50:0.95)'),
    (SEG_CONFIG, [8, 16, 32], 'Semantic FPN', 'mean IoU')])
def test_the_demo_trains_shows_and_is_not_repeated(config, widths, kind, figure, tmp_path, capsys,
                                                   monkeypatch):
    monkeypatch.chdir(ROOT)
    demo = load_tool('demo.py')
    if config == SEG_CONFIG:
        # The detector is trained by torch.distributed.run, which takes most of the time.
        def fork(command, **kwargs):
            tool, *argv = command[command.index('--standalone') + 2:]
            run_ranks(load_tool(tool.name).main, argv, num=2, log=tmp_path / 'output.txt')

        monkeypatch.setattr(local_training, 'subprocess', SimpleNamespace(run=fork))
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
