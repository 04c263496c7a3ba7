"""tools/analysis_tools/compare.py as people call it, interrupted and not."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kw_mm.datasets import write_shapes

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'analysis_tools' / 'compare.py'
CONFIGS = [ROOT / 'configs' / 'demo' / f'mask-rcnn_{name}_fpn_shapes.py'
           for name in ('r18', 'kw1x-r18')]


def command(data, out, *options):
    own = [part for split in ('train', 'val') for part in (
        f'--{split}-data', data / 'annotations' / f'instances_{split}.json', data / split)]
    return [sys.executable, TOOL, *CONFIGS, '--out', out, *own, *options]


def small(data, out):
    return command(data, out, '--seeds', '3', '--jobs', '1', '--cfg-options',
                   'train_cfg.max_epochs=3', 'train_cfg.val_interval=3',
                   'model.backbone.base_channels=8', 'model.neck.in_channels=[8,16,32,64]',
                   'log_processor.window_size=1', 'default_hooks.logger.interval=1')


def run(command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_killed_comparison_ends_with_the_same_digits(tmp_path):
    data = write_shapes(tmp_path / 'shapes', num_train=6, num_val=2, size=64).root
    whole = run(small(data, tmp_path / 'whole'))
    assert whole.returncode == 0, whole.stdout[-3000:] + whole.stderr[-3000:]
    assert f'[2/2] {CONFIGS[1].stem}, seed 3: coco/bbox_mAP' in whole.stdout
    report = (tmp_path / 'whole' / 'report.md').read_text()
    assert '| seed 3 |' in report and 'custom_hooks' in report

    # In the middle of the second training, when its first checkpoint is there.
    out = tmp_path / 'killed'
    with subprocess.Popen(small(data, out), cwd=ROOT, stdout=subprocess.DEVNULL,
                          stderr=subprocess.DEVNULL, start_new_session=True) as process:
        while not (out / CONFIGS[1].stem / 'seed_3' / 'epoch_1.pth').exists():
            assert process.poll() is None
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
    again = run(small(data, out))
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert f'[1/2] {CONFIGS[0].stem}, seed 3: training' not in again.stdout

    def digits(folder):
        results = json.loads((folder / 'results.json').read_text())
        return [(run['arm'], run['metrics'], run['curve']) for run in results['runs']]

    assert digits(out) == digits(tmp_path / 'whole')


@pytest.mark.parametrize('options, message', [
    (['--val-data', 'a.json', 'b'], '--train-data and --val-data must be given together'),
    (['--seeds', '1', '1'], 'seeds be different'),
    (['--start', 'a.pth', '--equal-parameters'], 'without --start'),
    (['--cfg-options', 'train_dataloader.dataset.data_root=nowhere/'], 'nowhere')])
def test_what_is_refused_at_once(tmp_path, options, message):
    done = run([sys.executable, TOOL, *CONFIGS, '--out', tmp_path / 'out', *options])
    assert done.returncode == 2 and message in done.stderr, done.stderr
