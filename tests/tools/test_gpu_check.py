"""``python tools/benchmark gpu``: parts that fail or hang, time that is kept, what is written."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from kw_benchmark import gpu
from kw_benchmark.schedule import Findings, Part, run_parts

ROOT = Path(__file__).parents[2]


def python(code):
    head = f'import sys; sys.path.insert(0, {str(ROOT / "tools" / "benchmark")!r})\n'
    return [sys.executable, '-c', head + code]


FINDS = 'from kw_benchmark.schedule import Findings; Findings().add("speed", ms=1.23456, b=4)\n'


def test_a_part_that_fails_or_hangs_costs_only_itself(tmp_path, monkeypatch):
    # The one that hangs has started a process of its own, and has found something before. When it
    # has, the clock jumps beyond its share: how long a process takes to start is the machine's.
    child = tmp_path / 'child'
    monotonic = time.monotonic
    clock = SimpleNamespace(monotonic=lambda: monotonic() + 60_000 * child.exists())
    monkeypatch.setattr('kw_benchmark.schedule.time', clock)
    hangs = FINDS + ('import subprocess, time, sys, pathlib\n'
                     'p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])\n'
                     f'child = pathlib.Path({str(child)!r}); new = child.with_suffix(".new")\n'
                     'new.write_text(str(p.pid)); new.rename(child); time.sleep(99)')
    parts = [Part('fails', 'raises', python(FINDS + 'raise ValueError("the reason")')),
             Part('hangs', 'sleeps', python(hangs)), Part('works', 'finds', python(FINDS))]
    assert not run_parts(parts, tmp_path / 'out', 100_000, dict(device='cpu'))
    found = json.loads((tmp_path / 'out' / 'results.json').read_text())
    assert {name: part['status'] for name, part in found['parts'].items()} == dict(
        fails='failed', hangs='out of time', works='done')
    for part in found['parts'].values():
        assert part['found']['tables'] == {'speed': [{'ms': '1.235', 'b': '4'}]}
    assert found['parts']['fails']['log'][-1] == 'ValueError: the reason'
    assert not found['parts']['works']['log']
    text = (tmp_path / 'out' / 'results.md').read_text()
    assert text.startswith('# Check on cpu, in small\n') and 'ValueError: the reason' in text
    assert '| hangs | sleeps | out of time |' in text and text.count('| 1.235 | 4 |') == 3
    with pytest.raises(ProcessLookupError):
        for _ in range(100):  # until whoever adopted it has noticed
            os.kill(int(child.read_text()), 0)
            time.sleep(0.05)


def test_time_that_is_left_and_time_that_is_over(tmp_path):
    late = Part('late', '', [sys.executable, '-c', ''])
    assert not run_parts([late], tmp_path, 0, {}) and late.status == 'not started'
    quick = Part('quick', '', [sys.executable, '-c', ''])
    assert run_parts([quick], tmp_path, 60, {}) and quick.seconds < 30


def test_findings_without_a_file(capsys, monkeypatch):
    monkeypatch.delenv('KW_MM_FINDINGS', raising=False)
    findings = Findings()
    findings.note('A sentence.')
    findings.add('table', first_column=1.0)
    assert findings.tables == {'table': [{'first column': '1'}]}
    assert capsys.readouterr().out == "A sentence.\ntable: {'first column': '1'}\n"


@pytest.mark.parametrize('argv, message', [
    (['--device', 'cuda'], 'needs a CUDA device'), (['--minutes', '0'], 'must be positive, got 0'),
    (['--device', 'abacus'], "got 'abacus'"), (['--only', 'nothing'], 'invalid choice')])
def test_what_it_refuses(argv, message, capsys, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(['--device', 'cpu', *argv])
    assert message in capsys.readouterr().err


def test_what_it_finds():
    facts = gpu.find_facts('cpu')
    assert facts['mmcv_operators'] == 'there' and facts['torch'] and facts['cpu']


def test_parts_are_there():
    from kw_benchmark import gpu_parts
    assert all(callable(getattr(gpu_parts, name)) for name in gpu.PARTS)


@pytest.mark.slow
def test_as_a_command(tmp_path):
    done = subprocess.run(
        [sys.executable, 'tools/benchmark', 'gpu', '--device', 'cpu', '--minutes', '5', '--only',
         'profile', '--out', str(tmp_path)], capture_output=True, text=True, cwd=ROOT,
        env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert done.returncode == 0, done.stdout + done.stderr
    assert '| profile |' in (tmp_path / 'results.md').read_text()
