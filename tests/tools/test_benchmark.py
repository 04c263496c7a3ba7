"""tools/analysis_tools/benchmark.py: no figures without parity, and what it writes."""
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from kw_mm.engine.benchmark import backbones
from kw_mm.engine.benchmark.memory import Memory
from kw_mm.engine.benchmark.suite import Workload
from kw_mm.layers import conv as conv_module

TOOL = Path(__file__).parents[2] / 'tools' / 'analysis_tools' / 'benchmark.py'
TINY = ['--depth', '18', '--options', 'base_channels=4', 'num_stages=1', 'out_indices=[0]',
        '--rounds', '1', '--warmups', '1', '--min-seconds', '0', '--rate-bytes', '4096',
        '--rate-size', '8', '--parity-shape', '2x32x32']


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location('benchmark', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(backbones, 'measure_memory', lambda name, kw_cfg, options, workload: Memory(
        200 if kw_cfg is None else 250, 100))
    return module


def test_nothing_is_said_of_speed_when_parity_fails(tool, monkeypatch, capsys, tmp_path):
    right = conv_module.assemble_kernel
    monkeypatch.setattr(conv_module, 'assemble_kernel', lambda *args: right(*args) * 1.01)
    monkeypatch.setattr('kw_mm.engine.benchmark.session.compare', None)  # is not reached
    files = [tmp_path / 'out.md', tmp_path / 'out.json']
    status = tool.main([*TINY, '--budgets', '1', '--inference', '1x32x32',
                        '--markdown', str(files[0]), '--json', str(files[1])])
    assert status == 1
    out = capsys.readouterr().out
    assert out.startswith('parity fails, so there are no figures:\n')
    assert 'FAILED outputs in float64: relative error' in out
    assert 'ms' not in out and '/ static' not in out
    assert not any(file.exists() for file in files)


@pytest.mark.slow
def test_a_tiny_suite_without_a_gpu(tool, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(tool, 'PAPER_CPU', {
        Workload('inference', 1, 32, 32): {1: 2.6}, Workload('training', 2, 32, 32): {1: 1.2},
        Workload('memory', 2, 32, 32): {1: 1.1}})
    files = [tmp_path / 'out.md', tmp_path / 'out.json']
    assert tool.main([*TINY, '--device', 'cpu', '--budgets', '1', '0.5', '--suite', 'paper',
                      '--layers', '2x32x32', '--markdown', str(files[0]),
                      '--json', str(files[1])]) == 0
    text = files[0].read_text()
    assert capsys.readouterr().out == text + '\n'
    assert text.startswith('# KWResNet, base_channels=4, num_stages=1, out_indices=[0], depth=18: ')
    assert text.count('no GPU at hand, the script is ready') == 2 * 10
    assert '| memory 2x3x32x32 | 1 | 0.0002 | 0.00025 | 1.25 | - |' in text
    found = json.loads(files[1].read_text())
    kinds = [(row['kind'], row['budget']) for row in found['rows'] if 'missing' not in row]
    assert kinds == [(kind, b) for kind in ('inference', 'training', 'memory') for b in (1, 0.5)]
    row = found['rows'][2]
    assert set(row['seconds']['KW']) == {'total', 'forward', 'backward', 'optimizer', 'rounds'}
    assert {layer['layer'] for layer in found['layers']} == {'layer1.0.conv1'}
    assert found['machine']['torch'] and found['machine']['threads'] == torch.get_num_threads()
    assert len(found['checks']) == 2


def test_goals_are_those_of_the_network_they_were_set_for(tool):
    parser = tool.make_parser()
    for argv, goal in (([], 2.6), (['--depth', '18'], None), (['--backbone', 'KWConvNeXt'], None)):
        args = parser.parse_args(['--suite', 'paper', '--device', 'cpu', *argv])
        goals = tool.workloads(args, tool.settle(args, parser))
        assert goals[Workload('inference', 1, 224, 224)].get(1) == goal


@pytest.mark.parametrize('argv, message', [
    ([], 'nothing to measure'),
    (['--inference', '224'], 'a shape must be BATCHxHEIGHTxWIDTH'),
    (['--suite', 'paper', '--rounds', '0'], '--rounds must be at least 1, got 0'),
    (['--suite', 'paper', '--parity-shape', '1x8x8'], '--parity-shape must have a batch of'),
    (['--suite', 'paper', '--backbone', 'KWConvNeXt', '--depth', '18'], '--depth is for KWResNet'),
    (['--suite', 'paper', '--device', 'cpu', '--cuda-graphs'], 'cuda_graphs needs a device'),
    (['--whole', 'a.py', 'b.py'], "config 'a.py' does not exist")])
def test_what_it_refuses(tool, argv, message, capsys):
    with pytest.raises(SystemExit):
        tool.main(argv)
    assert message in capsys.readouterr().err
