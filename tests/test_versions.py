"""The supported ranges, and errors for versions outside them."""
from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

from kw_mm import versions

ROOT = Path(__file__).resolve().parents[1]


def install(monkeypatch: pytest.MonkeyPatch, **found: str) -> None:
    """Makes exactly these packages look installed."""

    def version(package: str) -> str:
        try:
            return found[package]
        except KeyError:
            raise versions.PackageNotFoundError(package) from None

    monkeypatch.setattr(versions, 'version', version)


@pytest.mark.parametrize('package, found, supported', [
    ('torch', '2.0.1', False),
    ('torch', '2.1.0', True),
    ('torch', '2.13.0+cpu', True),
    ('torch', '2.14.0.dev20260101+cu130', True),
    ('mmcv', '1.7.2', False),
    ('mmcv', '2.0.0rc4', True),
    ('mmcv', '2.1.0', True),
    ('mmcv', '2.2.0rc1', False),
    ('mmcv', '2.2.0', False),
    ('mmengine', '0.9.1', False),
    ('mmengine', '0.10.7', True),
    ('mmdet', '2.28.2', False),
    ('mmdet', '3.3.0', True),
    ('mmsegmentation', '0.30.0', False),
    ('mmsegmentation', '1.2.2', True),
    ('onedl-mmengine', '0.10.12', True),
    ('onedl-mmcv', '2.3.6', True),
    ('onedl-mmcv', '2.4.0', False),
    ('onedl-mmdetection', '3.5.1', True),
    ('onedl-mmsegmentation', '1.4.2', True),
    # A private build.
    ('mmcv', 'unknown', True),
])
def test_ranges(package: str, found: str, supported: bool) -> None:
    assert versions.is_supported(package, found) is supported


def test_core_alone_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch='2.13.0')
    versions.check_versions()


def test_every_unsupported_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch='2.13.0', mmcv='2.2.0', mmdet='2.28.2', mmengine='0.10.7')
    with pytest.raises(ImportError) as error:
        versions.check_versions()
    mmcv, mmdet = str(error.value).splitlines()
    assert 'mmcv 2.2.0 is installed' in mmcv
    assert 'supports mmcv>=2.0.0rc4,<2.2.0' in mmcv
    assert 'pip install --no-build-isolation "mmcv>=2.0.0rc4,<2.2.0"' in mmcv
    assert 'mmdet 2.28.2 is installed' in mmdet
    assert 'pip install "mmdet>=3.0,<3.4"' in mmdet


FORK = {'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6', 'onedl-mmdetection': '3.5.1',
        'onedl-mmsegmentation': '1.4.2'}


def test_the_fork_alone_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch='2.12.0', **FORK)
    versions.check_versions()


def test_versions_of_the_fork_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, torch='2.12.0', **{**FORK, 'onedl-mmcv': '2.4.0'})
    with pytest.raises(ImportError, match='onedl-mmcv 2.4.0 is installed') as error:
        versions.check_versions()
    assert 'pip install --no-build-isolation "onedl-mmcv>=2.3,<2.4"' in str(error.value)


@pytest.mark.parametrize('found, name', [
    (dict(mmcv='2.1.0'), 'mmcv'), (FORK, 'onedl-mmcv'), ({}, 'mmcv'),
    # Missing packages come from where the others are from.
    ({'onedl-mmengine': '0.10.12'}, 'onedl-mmcv'), ({'mmengine': '0.10.7'}, 'mmcv')])
def test_who_provides_a_package(found: dict[str, str], name: str) -> None:
    assert versions.distribution('mmcv', found) == name
    assert versions.distribution('torch', found) == 'torch'


def test_no_extra_asks_for_upstream_where_the_fork_may_be() -> None:
    # `pip install '.[det]'` put upstream's files over the fork's.
    setup = (ROOT / 'setup.py').read_text(encoding='utf-8')
    extras = {}
    exec(re.search(r'^EXTRAS = \{.*?^\}', setup, re.M | re.S)[0],
         dict(ranged=lambda *names: list(names), VERSIONS=vars(versions), TEST=[],
              DEPLOY=[]), extras)
    extras = extras['EXTRAS']
    mm = {*versions.FORKS, *versions.FORKS.values()}
    assert not mm & {*extras['det'], *extras['seg'], *extras['all']}
    assert mm & {*extras['openmmlab']} == set(versions.FORKS)
    assert mm & {*extras['onedl']} == set(versions.FORKS.values())


def test_the_citation_has_the_version() -> None:
    citation = (ROOT / 'CITATION.cff').read_text(encoding='utf-8')
    assert f'\nversion: {versions.__version__}\n' in citation


def test_absent_package_has_no_version() -> None:
    assert versions.installed_version('no-such-package-anywhere') is None
    assert versions.installed_version('torch') is not None


def test_pins_lie_in_the_ranges() -> None:
    pins = dict(re.findall(r'^([\w-]+)==(\S+)', (ROOT / 'requirements.txt').read_text(), re.M))
    for package in versions.SUPPORTED.keys() - versions.FORKS.values():
        assert versions.is_supported(package, pins[package]), package
    assert int(pins['setuptools'].split('.')[0]) < 82


def test_setup_can_read_the_file_without_importing_anything() -> None:
    # setup.py runs it where neither torch nor packaging is installed.
    names = runpy.run_path(str(ROOT / 'kw_mm' / 'versions.py'))
    assert names['SUPPORTED'] == versions.SUPPORTED
    imports = re.findall(r'^(?:import|from) (\w+)', Path(versions.__file__).read_text(), re.M)
    assert set(imports) == {'__future__', 'collections', 'importlib'}
