"""``python tools/benchmark tune``: the fastest way of all measured cases and their neighbours."""
import json

import pytest
import torch
from kw_benchmark import tune
from kw_benchmark.setting import Setting
from kw_benchmark.tune import Measurement, find_shapes, make_rules, measure

from kw_mm.ops import path_table
from kw_mm.ops.path_table import Case, Table


def measured(batch, positions, *, training=False, **milliseconds):
    return Measurement(Case('dense', batch, positions, 'contiguous', training), 64, milliseconds)


def test_rules_by_hand():
    found = [measured(1, 100, rows=1, grouped=2), measured(1, 400, rows=1, grouped=2),
             measured(4, 100, rows=1, grouped=2), measured(4, 400, rows=2, grouped=1),
             measured(16, 100, rows=1, grouped=2), measured(16, 400, rows=2, grouped=1),
             measured(16, 100, training=True, sample_by_sample=1.02, rows=1, grouped=3)]
    table = Table('cpu', 'by hand', tuple(make_rules(found)))

    def choose(batch, positions, training=False):
        return table.choose(Case('dense', batch, positions, 'contiguous', training)).__name__

    for m in found:
        expected = 'sample_by_sample' if m.case.training else min(
            m.milliseconds, key=m.milliseconds.get)
        assert table.choose(m.case).__name__ == expected
    # Between measurements the nearest one counts, as a ratio: 2 lies between 1 and 4.
    assert [choose(2, 400), choose(3, 400), choose(3, 200), choose(3, 201)] == [
        'rows', 'grouped', 'rows', 'grouped']
    assert choose(1000, 10**6) == 'grouped' and choose(1, 1) == 'rows'
    # One of nearly equal ways that takes all kernels; and so for what was not measured.
    assert choose(9, 9, training=True) == 'sample_by_sample'
    assert [rule.path for rule in table.rules if rule.is_last] == [
        'pointwise', 'sample_by_sample', 'sample_by_sample']
    # Batches 4 and 16 choose alike.
    assert len(table.rules) == 1 + 2 + 1 + 3


def test_what_is_measured():
    shapes = find_shapes(tune.BATCHES, list(path_table.KINDS))
    assert all(s.batch * s.channels * s.positions <= tune.MOST_NUMBERS for s in shapes)
    assert any(s.batch == 128 for s in shapes)
    assert ('dense', 16, 64, (200, 336)) in shapes
    assert ('dense', 128, 64, (200, 336)) not in shapes


@pytest.mark.parametrize('kind', list(path_table.KINDS))
def test_every_way_is_timed(kind):
    for batch, names in ((1, set(path_table.KINDS[kind]) - {'grouped'}),
                         (2, set(path_table.KINDS[kind]))):
        found = measure(tune.Shape(kind, batch, 8, (5, 4)), Setting(channels_last=True), True,
                        num_rounds=1, num_warmups=1, min_seconds=0)
        assert set(found.milliseconds) == names and found.case.positions == 20
        assert found.fastest in names and min(found.milliseconds.values()) > 0


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tune, 'LARGE', ())
    monkeypatch.setattr(tune, 'SMALL', ((4, 4), (2, 2)))
    monkeypatch.setattr(tune, 'CHANNELS', dict(pointwise=8, dense=4, grouped=4))
    monkeypatch.setattr(tune, 'TIMING', dict(num_rounds=1, num_warmups=1, min_seconds=0))
    before = torch.backends.cudnn.benchmark
    file = tmp_path / 'paths.json'
    assert tune.main(['--device', 'cpu', '--out', str(file), '--batches', '2', '1']) == 0
    torch.backends.cudnn.benchmark = before
    value = json.loads(file.read_text())
    assert value['source'].startswith('measured: ') and 'float32' in value['source']
    assert len(value['measured']) == 3 * 2 * 2 * 4
    assert 'dense 2x8x2x2 channels_last, training: ' in capsys.readouterr().out
    try:
        path_table.use_paths(file)
        for m in value['measured']:
            milliseconds, _ = m.pop('milliseconds'), m.pop('channels')
            chosen = path_table.table_of('cpu').choose(Case(**m)).__name__
            assert milliseconds[chosen] * tune.GAIN <= min(milliseconds.values())
    finally:
        path_table.use_paths(None)


@pytest.mark.parametrize('argv, message', [
    (['--out', 'x', '--batches', '0'], '--batches must be positive, got 0'),
    (['--device', 'cuda', '--out', 'x'], '--device cuda needs a CUDA device')])
def test_wrong_arguments(argv, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(SystemExit):
        tune.main(argv)
    assert message in capsys.readouterr().err
