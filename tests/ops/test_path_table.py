"""The table that chooses how to convolve each sample with its own kernel, and files of it."""
import json
import os
import subprocess
import sys

import pytest
import torch

from kw_mm import ops
from kw_mm.ops import convolution, path_table, reference
from kw_mm.ops import convolution_paths as paths
from kw_mm.ops.path_table import SHIPPED, Case, Rule, Table, describe_table, parse_table

LAST = [Rule('pointwise', 'pointwise'), Rule('dense', 'grouped'), Rule('grouped', 'grouped')]
PLAIN = (1, 1), (1, 1), (1, 1), 1


@pytest.fixture(autouse=True)
def shipped_tables():
    yield
    ops.use_paths(None)


def write(path, rules, device_type='cpu'):
    path.write_text(json.dumps(describe_table(Table(device_type, 'by hand', tuple(rules)))))
    return path


def choose(x, kernel, geometry=PLAIN):
    return convolution.choose_path(x, kernel, *geometry)


@pytest.mark.parametrize('case, path', [
    (Case('pointwise', 1, 9999, 'channels_last', False), 'sample_by_sample'),
    (Case('pointwise', 1, 9999, 'contiguous', False), 'pointwise'),
    (Case('pointwise', 8, 9999, 'channels_last', True), 'pointwise'),
    (Case('dense', 2, 67200, 'channels_last', True), 'sample_by_sample'),
    (Case('dense', 2, 67200, 'contiguous', True), 'grouped'),
    (Case('dense', 4, 16800, 'channels_last', True), 'grouped'),
    (Case('dense', 4, 16800, 'channels_last', False), 'sample_by_sample'),
    (Case('dense', 128, 49, 'channels_last', True), 'rows'),
    (Case('dense', 128, 196, 'channels_last', False), 'rows'),
    (Case('dense', 128, 3136, 'channels_last', False), 'grouped'),
    (Case('dense', 128, 49, 'contiguous', True), 'im2col'),
    (Case('dense', 1, 49, 'contiguous', False), 'sample_by_sample'),
    (Case('dense', 128, 49, 'contiguous', True, 3), 'grouped'),
    (Case('grouped', 2, 67200, 'channels_last', False), 'sample_by_sample'),
    (Case('grouped', 2, 49, 'channels_last', False), 'grouped'),
    (Case('grouped', 2, 67200, 'contiguous', False), 'grouped')])
def test_what_is_shipped_for_gpus(case, path):
    assert SHIPPED.choose(case) is getattr(paths, path)


def test_devices_and_their_tables():
    assert path_table.table_of('cpu') is None  # the rules of convolution.py
    assert path_table.table_of('cuda') is path_table.table_of('meta') is SHIPPED
    with torch.device('meta'):
        x, kernel = torch.empty(2, 4, 9, 9), torch.empty(2, 4, 4, 3, 3)
        assert choose(x, kernel) is paths.im2col
        assert choose(x.to(memory_format=torch.channels_last), kernel) is paths.sample_by_sample
        assert choose(x[:1], kernel[:1]) is paths.one
        assert choose(x, kernel, ((1, 1), 'same', (1, 1), 1)) is paths.grouped
        assert choose(x, kernel[:, :, :2], ((1, 1), (1, 1), (1, 1), 2)) is paths.grouped


@pytest.mark.parametrize('path', path_table.KINDS['dense'])
def test_a_file_decides(path, tmp_path):
    torch.manual_seed(0)
    x, kernel = torch.randn(3, 4, 6, 5), torch.randn(3, 2, 4, 3, 3)
    ops.use_paths(write(tmp_path / 'paths.json', [Rule('dense', path, batch=3), *LAST]))
    assert choose(x, kernel) is getattr(paths, path)
    assert choose(x[:1], kernel[:1]) is not paths.grouped  # nothing to group
    torch.testing.assert_close(ops.dynamic_conv(x, kernel, None, *PLAIN),
                               reference.dynamic_conv(x, kernel, None, *PLAIN))
    assert path_table.table_of('cuda') is SHIPPED
    ops.use_paths(None)
    assert path_table.table_of('cpu') is None


def test_every_condition():
    rules = (Rule('dense', 'rows', batch=2, positions=10, layout='channels_last', training=True),
             *LAST)
    table, case = Table('cuda', 'by hand', rules), Case('dense', 2, 10, 'channels_last', True)
    assert table.choose(case) is paths.rows
    for change in (dict(batch=3), dict(positions=11), dict(layout='contiguous'),
                   dict(training=False)):
        assert table.choose(case._replace(**change)) is paths.grouped


@pytest.mark.parametrize('change, message', [
    (dict(format=2), 'format must be 1, got 2'),
    (dict(device_type=None), 'device_type must be a text, got None'),
    (dict(rules='none'), "rules must be a list, got 'none'"),
    (dict(rules=[]), 'rules must end with one for all pointwise kernels, without conditions'),
    (dict(rules=[dict(kernel='dense')]), r'rules\[0\] must be an object with kernel and path, and'),
    (dict(rules=[dict(kernel='dense', path='rows', size=3)]), r"got .*'size': 3"),
    (dict(rules=[dict(kernel='round', path='rows')]),
     r"rules\[0\].kernel must be one of pointwise, dense, grouped, got 'round'"),
    (dict(rules=[dict(kernel='grouped', path='rows')]),
     r'rules\[0\].path must be one of sample_by_sample, grouped for grouped kernels'),
    (dict(rules=[dict(kernel='dense', path='rows', batch=0)]),
     r'rules\[0\].batch must be an integer >= 1, or null, got 0'),
    (dict(rules=[dict(kernel='dense', path='rows', positions=1.5)]), 'positions must be an int'),
    (dict(rules=[dict(kernel='dense', path='rows', layout='NHWC')]), 'layout must be one of cont'),
    (dict(rules=[dict(kernel='dense', path='rows', training=1)]), 'training must be true, false'),
    (dict(rules=[dict(kernel='dense', path='im2col'), *(
        dict(kernel=kind, path='grouped') for kind in ('pointwise', 'grouped'))]),
     'rules must end with one for all dense kernels')])
def test_what_is_wrong_with_a_file_is_said(change, message, tmp_path):
    file = write(tmp_path / 'paths.json', LAST)
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=f'paths.json is no table of paths: .*{message}'):
        ops.use_paths(file)
    assert path_table.table_of('cpu') is None


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        ops.use_paths(tmp_path / 'missing.json')
    (tmp_path / 'torn.json').write_text('{"format": 1')
    with pytest.raises(ValueError, match='torn.json is no table of paths'):
        ops.use_paths(tmp_path / 'torn.json')
    (tmp_path / 'list.json').write_text('[]')
    with pytest.raises(ValueError, match='it must be an object, got list'):
        ops.use_paths(tmp_path / 'list.json')


def test_there_and_back():
    assert parse_table(json.loads(json.dumps(describe_table(SHIPPED)))) == SHIPPED


@pytest.mark.slow
def test_the_file_in_the_environment(tmp_path):
    file = write(tmp_path / 'paths.json', [Rule('dense', 'rows'), *LAST])
    code = 'from kw_mm.ops import path_table; print(path_table.table_of("cpu").rules[0].path)'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'KW_MM_PATHS': str(file)})
    assert done.stdout.split() == ['rows'], done.stderr
