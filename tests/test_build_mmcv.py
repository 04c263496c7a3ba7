"""The build of mmcv reports its progress, failures, and a wheel that does not fit."""
from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

INSTALL = Path(__file__).resolve().parents[1] / 'tools' / 'install'


@pytest.fixture
def build_mmcv(monkeypatch: pytest.MonkeyPatch):
    # Its folder comes first, as when it is run.
    monkeypatch.syspath_prepend(INSTALL)
    spec = importlib.util.spec_from_file_location('build_mmcv', INSTALL / 'build_mmcv.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_progress_counts_files_and_estimates(build_mmcv) -> None:
    progress = build_mmcv.Progress(jobs=2, core_seconds=800, now=100)
    assert progress.line(110) == 'mmcv: pip is getting ready, 10 s'
    progress.read('  running build_ext\n', now=120)
    # At the start: 800 s of one core are 400 s of two.
    assert progress.line(130) == 'mmcv: 0 of ? files compiled, 30 s, about 6 min 30 s to go'
    progress.read('  [20/80] c++ -MMD -c nms.cpp\n', now=220)
    # 20 files in 100 s, and 8 more in 40 s by the guess: 5 s for each of the other 60.
    assert progress.line(220) == 'mmcv: 20 of 80 files compiled, 2 min 00 s, about 5 min 00 s to go'
    # Three times slower from the start: (300 + 40) / 28 s for each.
    assert progress.line(420).endswith('about 12 min 09 s to go')


def test_progress_without_a_sign_of_the_end(build_mmcv) -> None:
    progress = build_mmcv.Progress(jobs=2, core_seconds=10, now=0)
    progress.read('running build_ext', now=0)
    assert progress.line(60).endswith('longer than usual')


@pytest.mark.parametrize('seconds, text', [
    (-3, '0 s'), (59.4, '59 s'), (60, '1 min 00 s'), (421, '7 min 01 s')])
def test_minutes(build_mmcv, seconds: float, text: str) -> None:
    assert build_mmcv.minutes(seconds) == text


@pytest.mark.parametrize('log, word', [
    ('pybind11.h:1: fatal error: Python.h: No such file or directory', 'python3-dev'),
    ('c++: fatal error: Killed signal terminated program cc1plus', 'MAX_JOBS=1'),
    ('OSError: CUDA_HOME environment variable is not set.', 'CUDA toolkit'),
    ("ModuleNotFoundError: No module named 'pkg_resources'", 'setuptools<82'),
    ('/bin/sh: 1: g++: not found', 'apt-get install g++'),
    ('ERROR: No matching distribution found for mmcv==2.1.0', 'network'),
])
def test_hint(build_mmcv, log: str, word: str) -> None:
    assert word in build_mmcv.hint(f'some line\n{log}\nanother')


def test_no_hint_for_an_unknown_failure(build_mmcv) -> None:
    assert build_mmcv.hint('error: expected ; before }') is None


def test_output_goes_to_the_log(build_mmcv, tmp_path: Path) -> None:
    progress = build_mmcv.Progress(jobs=1, core_seconds=1, now=0)
    log = tmp_path / 'build.log'
    code = 'print("[3/9] c++"); raise SystemExit(5)'
    assert build_mmcv.run_with_progress([sys.executable, '-c', code], {}, log, progress) == 5
    assert log.read_text() == '[3/9] c++\n'
    assert (progress.done, progress.total) == (3, 9)


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Sets CXX to a compiler that prints its name and arguments."""
    def compiler(name: str) -> Path:
        script = tmp_path / 'compiler'
        script.write_text(f'#!/bin/sh\necho "{name}" "$@"\n')
        script.chmod(0o755)
        monkeypatch.setenv('CXX', f'{script} -pipe')
        return script
    return compiler


def environment(build_mmcv, monkeypatch, tmp_path: Path, gpu: bool,
                options: list[str]) -> tuple[dict, float]:
    monkeypatch.setattr(build_mmcv, 'gpu_support', lambda: (gpu, gpu))
    monkeypatch.setattr(build_mmcv, 'standard_option', lambda: options)
    monkeypatch.delenv('FORCE_CUDA', raising=False)
    monkeypatch.delenv('NVCC_APPEND_FLAGS', raising=False)
    return build_mmcv.build_environment(tmp_path)


def said_by(command: str) -> str:
    return subprocess.run([command, '-v', 'a b'], capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize('options', [[], ['-std=c++20']])
def test_gcc_compiles_sooner(build_mmcv, monkeypatch, tmp_path, compiler, options) -> None:
    compiler('Copyright (C) Free Software Foundation, Inc.')
    env, seconds = environment(build_mmcv, monkeypatch, tmp_path, False, options)
    assert seconds == build_mmcv.CORE_SECONDS_PRECOMPILED
    assert said_by(env['CXX']).endswith(' '.join(['Foundation, Inc. -pipe -v a b', *options]))


@pytest.mark.parametrize('name, gpu, wanted', [
    ('Debian clang version 14.0.6', False, 'CORE_SECONDS_CPU'),
    ('Free Software Foundation', True, 'CORE_SECONDS_CUDA')])
def test_other_compilers_and_cuda_as_pip_calls_them(
        build_mmcv, monkeypatch, tmp_path, compiler, name: str, gpu: bool, wanted: str) -> None:
    script = compiler(name)
    env, seconds = environment(build_mmcv, monkeypatch, tmp_path, gpu, [])
    assert env['CXX'] == f'{script} -pipe' and 'NVCC_APPEND_FLAGS' not in env
    assert seconds == getattr(build_mmcv, wanted)
    # But told of the C++ that torch asks for: with mmcv's, no file compiled on torch 2.14.
    env, seconds = environment(build_mmcv, monkeypatch, tmp_path, gpu, ['-std=c++20'])
    assert said_by(env['CXX']) == f'{name} -pipe -v a b -std=c++20'
    assert env.get('NVCC_APPEND_FLAGS') == ('-std=c++20' if gpu else None)
    assert seconds == getattr(build_mmcv, wanted)


@pytest.mark.parametrize('asked, option', [('17', []), ('20', ['-std=c++20']), (None, [])])
def test_the_standard_that_torch_asks_for(build_mmcv, tmp_path, asked, option) -> None:
    if asked:
        header = tmp_path / 'include' / 'ATen' / 'ATen.h'
        header.parent.mkdir(parents=True)
        header.write_text(f'#error C++{asked} or later compatible compiler is required to use it.')
    assert build_mmcv.standard_option(tmp_path) == option
    assert isinstance(build_mmcv.standard_option(), list)


def test_no_compiler_and_folders_without_scripts(build_mmcv, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv('CXX', 'no-such-compiler')
    assert build_mmcv.wrap_compiler(tmp_path, [], True) is None
    monkeypatch.delenv('CXX')
    monkeypatch.setattr(Path, 'chmod', lambda self, mode: None)  # as if mounted with noexec
    (tmp_path / 'c++').unlink()
    assert build_mmcv.wrap_compiler(tmp_path, [], True) is None


class Pip:
    """Replaces pip and the operators, which work once mmcv has been compiled here."""

    def __init__(self, build_mmcv, monkeypatch: pytest.MonkeyPatch, prefix: Path,
                 versions: dict[str, str], works: bool, cached: bool) -> None:
        self.works = works
        self.cached = cached
        self.calls: list[bool] = []
        self.versions = versions
        monkeypatch.setattr(sys, 'prefix', str(prefix))
        monkeypatch.setattr(importlib.metadata, 'version', self.version)
        monkeypatch.setattr(build_mmcv, 'install', self.install)
        monkeypatch.setattr(build_mmcv, 'run_python',
                            lambda code: None if self.works else 'undefined symbol')
        self.main = build_mmcv.main

    def version(self, package: str) -> str:
        if package not in self.versions:
            raise importlib.metadata.PackageNotFoundError(package)
        return self.versions[package]

    def install(self, name: str, versions: str, constraint: Path | None, log: Path,
                again: bool) -> bool:
        self.installed = name + versions
        self.calls.append(again)
        compiled = again or not self.cached
        self.works = self.works or compiled
        return compiled


def test_fresh_environment_compiles_once(build_mmcv, monkeypatch, tmp_path) -> None:
    pip = Pip(build_mmcv, monkeypatch, tmp_path, {'torch': '2.13.0'}, works=False, cached=False)
    assert pip.main([]) == 0
    assert pip.calls == [False]
    assert (tmp_path / 'mmcv-built-for.txt').read_text() == '2.13.0'


def test_cached_wheel_for_another_torch_is_compiled_again(build_mmcv, monkeypatch,
                                                          tmp_path) -> None:
    # pip's cache ignores the version of torch.
    pip = Pip(build_mmcv, monkeypatch, tmp_path, {'torch': '2.13.0'}, works=False, cached=True)
    assert pip.main([]) == 0
    assert pip.calls == [False, True]


def test_installed_and_working_is_left_alone(build_mmcv, monkeypatch, tmp_path) -> None:
    versions = {'torch': '2.13.0', 'mmcv': '2.1.0'}
    pip = Pip(build_mmcv, monkeypatch, tmp_path, versions, works=True, cached=True)
    assert pip.main([]) == 0
    assert pip.calls == []


def test_new_torch_means_compiling_again(build_mmcv, monkeypatch, tmp_path) -> None:
    # It may still load by luck, so a working import proves nothing.
    (tmp_path / 'mmcv-built-for.txt').write_text('2.12.0')
    versions = {'torch': '2.13.0', 'mmcv': '2.1.0'}
    pip = Pip(build_mmcv, monkeypatch, tmp_path, versions, works=True, cached=True)
    assert pip.main([]) == 0
    assert pip.calls == [True]


@pytest.mark.parametrize('found, args, wanted', [
    ({}, [], 'mmcv>=2.0.0rc4,<2.2.0'), ({}, ['--fork'], 'onedl-mmcv>=2.3,<2.4'),
    ({'onedl-mmengine': '0.10.12'}, [], 'onedl-mmcv>=2.3,<2.4')])
def test_which_mmcv_is_installed(build_mmcv, monkeypatch, tmp_path, found, args, wanted) -> None:
    pip = Pip(build_mmcv, monkeypatch, tmp_path, {'torch': '2.12.0', **found}, works=False,
              cached=False)
    assert pip.main(args) == 0
    assert pip.installed == wanted


def test_torch_must_be_there(build_mmcv, monkeypatch, tmp_path) -> None:
    pip = Pip(build_mmcv, monkeypatch, tmp_path, {}, works=False, cached=False)
    with pytest.raises(SystemExit, match='torch is not installed'):
        pip.main([])
