"""Compiling with precompiled headers, and as usual if that does not work."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).resolve().parents[1] / 'tools' / 'install' / 'precompiled.py'

COMMON = {
    'pytorch_cpp_helper.hpp': '#pragma once\n#include <vector>\n#define NAME 1\n',
    'pytorch_device_registry.hpp': '#pragma once\ninline int twice(int x) { return 2 * x; }\n',
}
SOURCE = """
#include "pytorch_cpp_helper.hpp"
#include "pytorch_device_registry.hpp"
int sum(const std::vector<int>& all) { int s = OFFSET; for (int x : all) s += twice(x); return s; }
"""


def is_gcc() -> bool:
    compiler = shutil.which('c++')
    return compiler is not None and 'Free Software Foundation' in subprocess.run(
        [compiler, '--version'], capture_output=True, text=True).stdout


pytestmark = pytest.mark.skipif(not is_gcc(), reason='the tool is for GCC')


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    """A folder with headers and a file like mmcv's."""
    folder = tmp_path / 'csrc'
    folder.mkdir()
    for name, text in {**COMMON, 'nms.cpp': SOURCE}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    folder = tmp_path / 'kept'
    folder.mkdir()
    return folder


def compiler(csrc: Path, out: Path, source: str = 'nms.cpp') -> list[str]:
    """The command that torch calls; with -H it prints the headers it reads."""
    return ['c++', '-MMD', '-MF', f'{out}.d', '-g', '-O3', '-fPIC', f'-I{csrc}', '-c',
            str(csrc / source), '-o', str(out), '-std=c++17', '-DOFFSET=3', '-H']


def run(kept: Path, command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, kept, *command], capture_output=True, text=True)


def reads_precompiled(done: subprocess.CompletedProcess, kept: Path) -> bool:
    return f'! {kept}/headers.hpp.gch' in done.stderr.splitlines()


def test_the_headers_are_read_once_and_the_code_is_the_same(csrc, kept, tmp_path) -> None:
    outs = [tmp_path / f'{name}.o' for name in 'ab']
    for out in outs:
        done = run(kept, compiler(csrc, out))
        assert done.returncode == 0, done.stderr
        assert reads_precompiled(done, kept)
        assert 'nms.cpp' in Path(f'{out}.d').read_text()
    assert 'vector' not in done.stderr
    plain = tmp_path / 'plain.o'
    subprocess.run([*compiler(csrc, plain), '-g0'], check=True, capture_output=True)
    assert outs[0].read_bytes() == outs[1].read_bytes() == plain.read_bytes()


def test_files_compiled_at_the_same_time_share_the_headers(csrc, kept, tmp_path) -> None:
    running = [subprocess.Popen([sys.executable, TOOL, kept, *compiler(csrc, tmp_path / f'{i}.o')],
                                stderr=subprocess.PIPE, text=True) for i in range(4)]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0] * 4
    # One of them has read the headers.
    assert sum('/vector\n' in text for text in said) == 1
    assert all(f'! {kept}/headers.hpp.gch\n' in text for text in said)


def test_other_flags_are_compiled_without(csrc, kept, tmp_path) -> None:
    # If GCC did not check, it would use the wrong code.
    assert run(kept, compiler(csrc, tmp_path / 'a.o')).returncode == 0
    done = run(kept, [*compiler(csrc, tmp_path / 'b.o'), '-DNAME=2', '-fno-PIC', '-O0'])
    assert done.returncode == 0, done.stderr
    assert not reads_precompiled(done, kept)


@pytest.mark.parametrize('damage', ['missing header', 'broken header', 'read-only', 'torn'])
def test_it_compiles_as_usual_without_precompiled_headers(csrc, kept, tmp_path, damage) -> None:
    out = tmp_path / 'a.o'
    if damage == 'missing header':
        (csrc / 'pytorch_device_registry.hpp').unlink()
        (csrc / 'nms.cpp').write_text('int twice(int x) { return 2 * x; }')
    elif damage == 'broken header':
        (csrc / 'pytorch_device_registry.hpp').write_text('#error only for GPUs')
        (csrc / 'nms.cpp').write_text('int twice(int x) { return 2 * x; }')
    elif damage == 'read-only':
        kept = kept / 'gone'
    else:
        assert run(kept, compiler(csrc, out)).returncode == 0
        made = kept / 'headers.hpp.gch'
        made.write_bytes(made.read_bytes()[:5000])
        out.unlink()
    for _ in range(2):
        done = run(kept, compiler(csrc, out))
        assert done.returncode == 0, done.stderr
        assert out.exists() and not (kept / 'unfinished').exists()


def test_a_file_that_clashes_with_the_headers_is_compiled_without(csrc, kept, tmp_path) -> None:
    (csrc / 'own.cpp').write_text('long twice(int x) { return 2 * x; }')
    done = run(kept, compiler(csrc, tmp_path / 'own.o', 'own.cpp'))
    assert done.returncode == 0 and (tmp_path / 'own.o').exists()
    assert 'own.cpp: no precompiled headers, now as usual' in done.stdout


def test_a_file_that_is_wrong_fails_as_ever(csrc, kept, tmp_path) -> None:
    (csrc / 'wrong.cpp').write_text('int f() { return nothing; }')
    done = run(kept, compiler(csrc, tmp_path / 'wrong.o', 'wrong.cpp'))
    assert done.returncode == 1 and "'nothing' was not declared" in done.stderr.replace(
        '‘', "'").replace('’', "'")


@pytest.mark.parametrize('words', [
    ['--version'], ['-dumpversion'], ['-E', '-xc++', '/dev/null'],
    ['-c', '-xc++', '/dev/null', '-o', '/dev/null']])
def test_other_commands_are_passed_on(kept, words) -> None:
    plain = subprocess.run(['c++', *words], capture_output=True, text=True)
    done = run(kept, ['c++', *words])
    assert (done.returncode, done.stdout, done.stderr) == (
        plain.returncode, plain.stdout, plain.stderr)
    assert list(kept.iterdir()) == []


def test_it_links(csrc, kept, tmp_path) -> None:
    out = tmp_path / 'a.o'
    run(kept, compiler(csrc, out))
    done = run(kept, ['c++', '-shared', str(out), '-o', str(tmp_path / 'a.so')])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / 'a.so').exists()
