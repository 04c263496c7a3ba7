"""The check of the environment reports every known problem."""
from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

INSTALL = Path(__file__).resolve().parents[1] / 'tools' / 'install'

GOOD = {
    'torch': '2.13.0+cpu',
    'numpy': '2.4.6',
    'packaging': '26.3',
    'mmengine': '0.10.7',
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
    'mmsegmentation': '1.2.2',
    'setuptools': '81.0.0',
    'ftfy': '6.3.1',
    'regex': '2026.11.15',
    'kw_mm': '0.1.0',
}
PINS = {'torch': '2.13.0', 'mmcv': '2.1.0', 'numpy': '2.4.6'}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, INSTALL / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    # dataclasses look for the module of a class here.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


check_env = load('check_env')


# The same, from the maintained fork.
FORK = {**{name: None for name in ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation')},
        'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1',
        'onedl-mmsegmentation': '1.4.2'}


class Run:
    """Replaces the fresh interpreter: code that contains a key fails with its value."""

    def __init__(self, **failures: str) -> None:
        self.failures = failures
        self.codes: list[str] = []

    def __call__(self, code: str) -> str | None:
        self.codes.append(code)
        return next((text for key, text in self.failures.items() if key in code), None)


def check(changes: dict[str, str | None] | None = None, pins: dict[str, str] | None = None,
          pkg_resources: bool = True, run: Run | None = None) -> list:
    return check_env.check_all({**GOOD, **(changes or {})}, pins, pkg_resources, run or Run())


def the_only(found: list):
    assert len(found) == 1, [str(finding) for finding in found]
    return found[0]


def test_good_environment_has_no_findings() -> None:
    run = Run()
    assert check(run=run, pins=PINS) == []
    assert any('nms' in code for code in run.codes)
    assert run.codes[-2] == 'import kw_mm'
    assert 'instruction_set' in run.codes[-1]


def test_the_fork_is_as_good() -> None:
    run = Run()
    # The fork needs no pkg_resources, and declares what it imports.
    without = {**FORK, 'setuptools': '84.2.1', 'ftfy': None, 'regex': None}
    assert check(without, pkg_resources=False, run=run) == []
    assert any('nms' in code for code in run.codes)
    assert {'import mmengine.runner', 'import mmdet.apis'} <= set(run.codes)
    table = check_env.table({**GOOD, **FORK}, None)
    assert 'onedl-mmcv' in table and '\nmmcv' not in table


def test_what_the_fork_lacks_comes_from_the_fork() -> None:
    finding = the_only(check({**FORK, 'onedl-mmcv': None}))
    assert finding.what == 'onedl-mmcv is not installed'
    # Which finds by itself that it is the fork's.
    assert finding.fix.endswith('build_mmcv.py')
    finding = the_only(check({**FORK, 'onedl-mmcv': '2.4.0'}))
    assert finding.what.startswith('onedl-mmcv 2.4.0 is installed')
    assert '"onedl-mmcv>=2.3,<2.4"' in finding.fix
    finding = the_only(check(FORK, run=Run(nms='undefined symbol: _ZN2at')))
    assert finding.fix.endswith('build_mmcv.py --again')


def test_upstream_over_the_fork() -> None:
    finding = the_only(check({'onedl-mmcv': '2.3.6'}))
    assert finding.error
    assert finding.what == 'both mmcv 2.1.0 and onedl-mmcv 2.3.6 are installed'
    assert 'uninstall mmcv onedl-mmcv' in finding.fix


def test_finding_says_what_why_and_how() -> None:
    text = str(check_env.Finding('it is broken', 'it is needed', 'mend it', error=False))
    assert text.splitlines() == [
        'note: it is broken',
        '  why it matters: it is needed',
        '  what to do:     mend it',
    ]


@pytest.mark.parametrize('package', ['torch', 'mmengine', 'mmcv', 'packaging'])
def test_missing_package(package: str) -> None:
    finding = the_only(check({package: None}))
    assert finding.error
    assert finding.what == f'{package} is not installed'
    wanted = 'build_mmcv.py' if package == 'mmcv' else f'install {package}'
    assert wanted in finding.fix.replace('"', '')


@pytest.mark.parametrize('package', ['mmdet', 'mmsegmentation'])
def test_one_of_the_frameworks_is_enough_without_pins(package: str) -> None:
    assert not the_only(check({package: None})).error
    assert the_only(check({package: None}, pins=PINS)).error


def test_unsupported_version() -> None:
    finding = the_only(check({'mmcv': '2.2.0'}))
    assert finding.error
    assert finding.what.startswith('mmcv 2.2.0 is installed')
    assert 'mmcv>=2.0.0rc4,<2.2.0' in finding.fix


def test_torch_replaced() -> None:
    # An unpinned torchvision once replaced torch 2.13 by 2.15.
    finding = the_only(check({'torch': '2.15.0'}, pins=PINS))
    assert finding.error
    assert 'torch 2.15.0 is installed, requirements.txt pins 2.13.0' in finding.what
    assert 'torchvision' in finding.why
    # Any torch within the supported range is fine.
    assert check({'torch': '2.15.0'}) == []


def test_local_version_fits_its_pin() -> None:
    assert check({'torch': '2.13.0+cu130'}, pins=PINS) == []


@pytest.mark.parametrize('version', ['84.2.1', None])
def test_setuptools_without_pkg_resources(version: str | None) -> None:
    finding = the_only(check({'setuptools': version}, pkg_resources=False))
    assert finding.error
    assert 'mmdet::' in finding.why
    assert '"setuptools<82"' in finding.fix


def test_torchvision_that_does_not_fit() -> None:
    run = Run(torchvision='RuntimeError: operator torchvision::nms does not exist')
    finding = the_only(check({'torchvision': '0.28.0'}, run=run))
    assert finding.error
    assert 'operator torchvision::nms does not exist' in finding.what
    assert finding.fix.endswith('uninstall torchvision')


def test_torchvision_that_fits_or_is_absent() -> None:
    assert check({'torchvision': '0.28.0'}) == []
    run = Run()
    check(run=run)
    assert not any('torchvision' in code for code in run.codes)


def test_missing_tokenizer_packages() -> None:
    finding = the_only(check({'ftfy': None, 'regex': None}))
    assert finding.error
    assert finding.what == 'ftfy and regex are not installed'
    assert finding.fix.endswith('install ftfy regex')
    assert the_only(check({'ftfy': None})).what == 'ftfy is not installed'


def test_mmcv_without_operators() -> None:
    # A wheel built in isolation has no _ext; one built for another torch does not load.
    run = Run(nms="ModuleNotFoundError: No module named 'mmcv._ext'")
    finding = the_only(check(run=run))
    assert finding.error
    assert 'mmcv._ext' in finding.what
    assert finding.fix.endswith('build_mmcv.py --again')


def test_mmcv_without_gpu_operators_is_a_note() -> None:
    run = Run(cuda='RuntimeError: nms_impl: implementation for device cuda:0 not found.')
    assert not the_only(check(run=run)).error


def test_import_that_fails() -> None:
    run = Run(mmseg='AssertionError: MMCV==2.2.0 is used but incompatible.')
    finding = the_only(check(run=run))
    assert finding.error
    assert 'mmseg' in finding.what
    assert 'MMCV==2.2.0' in finding.what


def test_missing_products_are_a_note() -> None:
    finding = the_only(check(run=Run(instruction_set='AssertionError: there are none for AVX2')))
    assert not finding.error
    assert 'there are none for AVX2' in finding.what
    assert 'C++ compiler' in finding.fix
    # Without kw_mm, or if it cannot be imported, there are none.
    run = Run(instruction_set='none')
    assert check({'kw_mm': None}, run=run) == []
    assert len(check(run=Run(kw_mm='ImportError: no'))) == 1


def test_one_cause_is_told_once() -> None:
    # mmdet cannot be imported either, but that follows from it.
    run = Run(nms='undefined symbol: _ZN2at', mmdet='undefined symbol: _ZN2at')
    assert 'operators' in the_only(check(run=run)).what


def test_unsupported_version_is_not_told_as_a_wrong_pin_too() -> None:
    assert 'supports mmcv' in the_only(check({'mmcv': '2.2.0'}, pins=PINS)).what


def test_nothing_is_run_without_torch() -> None:
    run = Run()
    assert the_only(check({'torch': None}, run=run)).what == 'torch is not installed'
    assert run.codes == []


def test_run_python() -> None:
    assert check_env.run_python('pass') is None
    assert check_env.run_python('raise ValueError("seven")') == 'ValueError: seven'
    assert check_env.run_python('raise SystemExit(3)') == 'it exited with status 3'


@pytest.mark.skipif(os.name != 'posix', reason='signals')
def test_run_python_survives_a_crash() -> None:
    crash = 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)'
    assert check_env.run_python(crash) == 'it crashed with signal 9'


def test_read_pins(tmp_path: Path) -> None:
    path = tmp_path / 'requirements.txt'
    path.write_text('# torch==1.0\ntorch==2.13.0\nPyYAML==6.0.3  # why\nnumpy>=1\n')
    assert check_env.read_pins(path) == {'torch': '2.13.0', 'pyyaml': '6.0.3'}


def test_table_shows_installed_and_pinned() -> None:
    with_pins = check_env.table(GOOD, PINS).splitlines()
    assert with_pins[0].split() == ['package', 'installed', 'supported', 'tested']
    assert with_pins[1].split() == ['torch', '2.13.0+cpu', '>=2.1', '2.13.0']
    assert check_env.table(GOOD, None).splitlines()[0].split()[-1] == 'supported'


def test_main_exits_1_on_an_error(monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture) -> None:
    finding = check_env.Finding('it is broken', 'it is needed', 'mend it')
    monkeypatch.setattr(check_env, 'check_all', lambda *_: [finding])
    assert check_env.main([]) == 1
    assert 'error: it is broken' in capsys.readouterr().err


def test_main_prints_the_table_after_a_note(monkeypatch: pytest.MonkeyPatch,
                                            capsys: pytest.CaptureFixture) -> None:
    finding = check_env.Finding('there is something', 'it may matter', 'see', error=False)
    monkeypatch.setattr(check_env, 'check_all', lambda *_: [finding])
    assert check_env.main([]) == 0
    out, err = capsys.readouterr()
    assert 'note: there is something' in err
    assert 'This environment can run kw_mm.' in out
