"""``python tools/benchmark``: no figures without parity, and what it writes."""
import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kw_benchmark import backbones, speed
from kw_benchmark.machine import Rates
from kw_benchmark.setting import KINDS, Workload

from kw_mm.layers import conv as conv_module

ROOT = Path(__file__).parents[2]
DEMO = ROOT / 'configs' / 'demo' / 'mask-rcnn_r18_fpn_shapes.py'
TINY = ['--depth', '18', '--options', 'base_channels=4', 'num_stages=1', 'out_indices=[0]',
        '--rounds', '1', '--warmups', '1', '--min-seconds', '0',
        '--parity-shape', '2x32x32']


@pytest.fixture(autouse=True)
def known_memory_and_rates(monkeypatch):
    monkeypatch.setattr(backbones, 'measure_memory', lambda subject, workload, static: (
        200 if static else 250))
    monkeypatch.setattr(speed, 'measure_rates', lambda setting: Rates(1e9, 1e9))
    # Each timing collects garbage first, and should not look through what other tests left.
    gc.collect()
    gc.freeze()


def test_nothing_is_said_of_speed_when_parity_fails(monkeypatch, capsys, tmp_path):
    right = conv_module.dynamic_conv
    monkeypatch.setattr(conv_module, 'dynamic_conv', lambda *args: right(*args) * 1.01)
    monkeypatch.setattr('kw_benchmark.speed.compare', None)  # is not reached
    files = [tmp_path / 'out.md', tmp_path / 'out.json']
    status = speed.main([*TINY, '--budgets', '1', '--inference', '1x32x32',
                        '--markdown', str(files[0]), '--json', str(files[1])])
    assert status == 1
    out = capsys.readouterr().out
    assert out.startswith('parity fails, so there are no figures:\n')
    assert 'FAILED outputs in float32: relative error' in out
    assert 'ms' not in out and '/ static' not in out
    assert not any(file.exists() for file in files)


@pytest.mark.slow
def test_a_tiny_suite_without_a_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    standard = speed.paper_suite
    monkeypatch.setattr(speed, 'paper_suite', lambda setting: standard(setting) if setting.on_cuda
                        else [Workload(kind, 2, 32, 32) for kind in KINDS])
    files = [tmp_path / 'out.md', tmp_path / 'out.json']
    assert speed.main([*TINY, '--device', 'cpu', '--budgets', '1', '0.5', '--suite', 'paper',
                      '--layers', '2x32x32', '--markdown', str(files[0]),
                      '--json', str(files[1])]) == 0
    text = files[0].read_text()
    assert capsys.readouterr().out == text + '\n'
    assert text.startswith('# KWResNet, base_channels=4, num_stages=1, out_indices=[0], depth=18: ')
    assert text.count('no GPU at hand, the script is ready') == 2 * 10
    assert '| memory 2x3x32x32 | 1 | 0.0002 | 0.00025 | 1.25 |' in text
    found = json.loads(files[1].read_text())
    kinds = [(row['kind'], row['budget']) for row in found['rows'] if 'missing' not in row]
    assert kinds == [(kind, b) for kind in ('inference', 'training', 'memory') for b in (1, 0.5)]
    row = found['rows'][2]
    assert set(row['seconds']['KW']) == {'total', 'forward', 'backward', 'optimizer', 'rounds'}
    assert {layer['layer'] for layer in found['layers']} == {'layer1.0.conv1'}
    assert found['machine']['torch'] and found['machine']['threads'] == torch.get_num_threads()
    assert len(found['checks']) == 2


def test_memory_where_the_system_does_not_tell_it(monkeypatch, capsys):
    # On Windows: No module named 'resource'.
    monkeypatch.setattr(speed, 'CAN_MEASURE_CPU', False)
    assert speed.main([*TINY, '--device', 'cpu', '--budgets', '1', '--memory', '2x32x32']) == 0
    assert 'this system does not tell the memory of a process' in capsys.readouterr().out


@pytest.mark.parametrize('argv, message', [
    ([], 'nothing to measure'),
    (['--inference', '224'], 'a shape must be BATCHxHEIGHTxWIDTH'),
    (['--suite', 'paper', '--rounds', '0'], '--rounds must be at least 1, got 0'),
    (['--suite', 'paper', '--parity-shape', '1x8x8'], '--parity-shape must have a batch of'),
    (['--suite', 'paper', '--backbone', 'KWConvNeXt', '--depth', '18'], '--depth is for KWResNet'),
    (['--suite', 'paper', '--device', 'cpu', '--cuda-graphs'], 'cuda_graphs needs a device'),
    (['--memory', '2x8x8', '--device', 'cpu', '--compile'], 'compile must be False for memory'),
    (['--training', '2x8x8', '--device', 'cuda', '--cuda-graphs'], 'captures inference alone'),
    (['--whole', str(DEMO), str(DEMO), '--compile'], 'does not go with --compile'),
    (['--whole', 'a.py', 'b.py'], "config 'a.py' does not exist")])
def test_what_it_refuses(argv, message, capsys):
    with pytest.raises(SystemExit):
        speed.main(argv)
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_as_a_command():
    def run(*argv):
        return subprocess.run([sys.executable, 'tools/benchmark', *argv], capture_output=True,
                              text=True, cwd=ROOT, env=dict(os.environ, PYTHONPATH=str(ROOT)))

    assert 'speed' in run('--help').stdout
    done = run('sped')
    assert done.returncode == 2 and 'speed' in done.stderr
    done = run('speed', *TINY, '--device', 'cpu', '--budgets', '1', '--memory', '2x32x32')
    assert done.returncode == 0 and '## Peak memory of training' in done.stdout
