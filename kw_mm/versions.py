"""Which versions of which packages kw_mm supports: stated here and nowhere else.

``setup.py`` runs this file before anything is installed, so its top level needs the standard
library only.
"""
from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

__version__ = '0.1.0'

REQUIRES_PYTHON = '>=3.10'

# By the names that pip uses. mmdet 3.3 and mmsegmentation 1.2 assert the same range of mmcv.
# docs/versions.md lists the versions that were tested.
SUPPORTED = {
    'torch': '>=2.1',
    'mmengine': '>=0.10.0,<0.11',
    'mmcv': '>=2.0.0rc4,<2.2.0',
    'mmdet': '>=3.0,<3.4',
    'mmsegmentation': '>=1.0,<1.3',
    'onedl-mmengine': '>=0.10.8,<0.11',
    'onedl-mmcv': '>=2.3,<2.4',
    'onedl-mmdetection': '>=3.4,<3.6',
    'onedl-mmsegmentation': '>=1.3,<1.5',
}

# The maintained fork of OpenMMLab installs the same modules from other packages.
FORKS = {
    'mmengine': 'onedl-mmengine',
    'mmcv': 'onedl-mmcv',
    'mmdet': 'onedl-mmdetection',
    'mmsegmentation': 'onedl-mmsegmentation',
}

# mmengine resolves `mmdet::...` configs with pkg_resources, which setuptools 82 removed. Not in
# SUPPORTED, because the core of kw_mm without mmengine, and the fork, work with it.
SETUPTOOLS = '<82'


def installed_version(package: str) -> str | None:
    """Returns the installed version of a package, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def distribution(package: str, versions: Mapping[str, str | None]) -> str:
    """Returns the name under which a package of OpenMMLab is installed, or should be.

    Args:
        package: Upstream's name.
        versions: Installed version of each distribution, or None.

    Returns:
        The fork's name if the fork's package is installed, or if neither is and other packages are
        the fork's; otherwise upstream's.
    """
    fork = FORKS.get(package)
    if fork is None or versions.get(package) is not None:
        return package
    has_fork = any(versions.get(name) is not None for name in FORKS.values())
    return fork if has_fork else package


def is_supported(package: str, found: str) -> bool:
    """Tells whether a version lies in the supported range of a package.

    Pre-releases and local versions (``2.13.0+cpu``) are compared by their number alone. Versions
    that do not follow PEP 440 come from private builds and are accepted.
    """
    # Imported here, because a build environment has no packaging.
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        return SpecifierSet(SUPPORTED[package]).contains(Version(found), prereleases=True)
    except InvalidVersion:
        return True


def install_command(package: str, pip: str = 'pip') -> str:
    """Returns what to type to get a supported version of a package."""
    # In an isolated build there is no torch, and mmcv is silently built without its operators.
    option = '--no-build-isolation ' if package in ('mmcv', 'onedl-mmcv') else ''
    return f'{pip} install {option}"{package}{SUPPORTED[package]}"'


def check_versions() -> None:
    """Checks the installed packages against the supported ranges.

    Absent packages are fine: the core needs torch alone.

    Raises:
        ImportError: If an installed package is outside its range; every such package is named.
    """
    found = {package: installed_version(package) for package in SUPPORTED}
    lines = [
        f'{package} {number} is installed, kw_mm {__version__} supports '
        f'{package}{SUPPORTED[package]}; type: {install_command(package)}'
        for package, number in found.items()
        if number is not None and not is_supported(package, number)
    ]
    if lines:
        raise ImportError('\n'.join(lines))
