"""Checks that an environment can run kw_mm with MMDetection and MMSegmentation.

    python tools/install/check_env.py                            # your own environment
    python tools/install/check_env.py --pins requirements.txt    # the one `make env` builds

Every finding says what is wrong, why it matters and what to type.
"""
from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PIP = f'{sys.executable} -m pip'
# Compiles whichever mmcv suits the packages that are there.
BUILD_MMCV = f'{sys.executable} tools/install/build_mmcv.py'

# These are required with --pins only; otherwise a detector alone is fine.
OPENMMLAB = ('mmengine', 'mmcv', 'mmdet', 'mmsegmentation')

# Two boxes that overlap by 0.9 and one apart. Uses the compiled operators for real: a wheel
# without them, or built for another torch, still imports as `mmcv`.
NMS = """
import torch
from mmcv.ops import nms
boxes = torch.tensor([[0., 0., 10., 10.], [0., 0., 10., 9.], [20., 20., 30., 30.]])
scores = torch.tensor([.9, .8, .7])
kept = nms(boxes.to(DEVICE), scores.to(DEVICE), iou_threshold=.5)[1].tolist()
assert kept == [0, 2], f'nms keeps boxes {kept}, not [0, 2]'
"""
NMS_ON_CPU = NMS.replace('DEVICE', "'cpu'")
NMS_ON_GPU = 'import torch\nif torch.cuda.is_available():' + NMS.replace(
    'DEVICE', "'cuda'").replace('\n', '\n    ')

# Where there is no such file for a CPU there is nothing to miss.
CPU_PRODUCTS = """
import torch
from kw_mm.ops.compiled import INSTRUCTION_SETS, instruction_set
capability = torch.backends.cpu.get_cpu_capability()
assert instruction_set() or capability not in INSTRUCTION_SETS, f'there are none for {capability}'
"""

# Returns None if the code runs in a fresh interpreter, else how it failed.
Run = Callable[[str], 'str | None']
Versions = Mapping[str, 'str | None']


@dataclass(frozen=True)
class Finding:
    """Something wrong (``error``) or worth knowing (not ``error``)."""

    what: str
    why: str
    fix: str
    error: bool = True

    def __str__(self) -> str:
        kind = 'error' if self.error else 'note'
        return f'{kind}: {self.what}\n  why it matters: {self.why}\n  what to do:     {self.fix}'


def run_python(code: str) -> str | None:
    """Runs code in a fresh interpreter, where a crash of a compiled module is only a result.

    Returns:
        None if it ran, else the last line it wrote or the signal that ended it.
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f'it crashed with signal {-done.returncode}'
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f'it exited with status {done.returncode}'


def load_supported() -> dict[str, object]:
    """Returns the names defined in ``kw_mm/versions.py``, without importing kw_mm (and torch)."""
    path = ROOT / 'kw_mm' / 'versions.py'
    if not path.exists():
        # Installed with pip: this file then lies in kw_mm/.mim/tools/install.
        path = ROOT.parent / 'versions.py'
    return runpy.run_path(str(path))


def read_pins(path: Path) -> dict[str, str]:
    """Returns ``{package: version}`` for the ``package==version`` lines of a requirements file."""
    pins = re.findall(r'^([\w.-]+)==([\w.!+-]+)', path.read_text(encoding='utf-8'), re.MULTILINE)
    return {name.lower(): number for name, number in pins}


def check_present(versions: Versions, strict: bool) -> list[Finding]:
    """Looks for packages that are not installed."""
    found = []
    names = load_supported()
    for package in ('torch', 'numpy', 'packaging', *OPENMMLAB):
        name = names['distribution'](package, versions)
        if versions.get(name) is not None:
            continue
        found.append(Finding(
            f'{name} is not installed',
            {
                'mmdet': 'detection configs need MMDetection',
                'mmsegmentation': 'segmentation configs need MMSegmentation',
            }.get(package, 'kw_mm and the OpenMMLab packages need it'),
            f'{PIP} install {package}' if package not in OPENMMLAB
            else BUILD_MMCV if package == 'mmcv' else names['install_command'](name, PIP),
            error=strict or package not in ('mmdet', 'mmsegmentation'),
        ))
    return found


def check_doubles(versions: Versions) -> list[Finding]:
    """Looks for packages that are installed twice, from upstream and from the fork."""
    return [
        Finding(
            f'both {package} {versions[package]} and {fork} {versions[fork]} are installed',
            'they install files of the same names, so each has overwritten some of the other',
            f'{PIP} uninstall {package} {fork}, then install one of them: '
            f'{load_supported()["install_command"](fork, PIP)}',
        )
        for package, fork in load_supported()['FORKS'].items()
        if versions.get(package) is not None and versions.get(fork) is not None
    ]


def check_ranges(versions: Versions) -> list[Finding]:
    """Compares installed versions with the ranges kw_mm supports."""
    names = load_supported()
    return [
        Finding(
            f'{package} {versions[package]} is installed, kw_mm supports {package}{supported}',
            'mmdet and mmsegmentation refuse other versions, or break on them later',
            names['install_command'](package, PIP),
        )
        for package, supported in names['SUPPORTED'].items()
        if versions.get(package) is not None
        and not names['is_supported'](package, versions[package])
    ]


def check_pins(versions: Versions, pins: Mapping[str, str]) -> list[Finding]:
    """Compares the pinned packages with what is installed; ``+cpu`` and the like do not count."""
    found = []
    for package, pin in pins.items():
        number = versions.get(package)
        if number is None or number.split('+')[0] == pin.split('+')[0]:
            continue
        why = f'what is tested is {package} {pin}'
        if package == 'torch':
            why = ('another package replaced it (an unpinned torchvision does), and the operators '
                   'of mmcv are compiled for one version of torch')
        found.append(Finding(
            f'{package} {number} is installed, requirements.txt pins {pin}', why,
            'rm -r .venv/steps && make env',
        ))
    return found


def check_setuptools(version: str | None, has_pkg_resources: bool) -> list[Finding]:
    """Looks for ``pkg_resources``, which setuptools brings up to version 81."""
    if has_pkg_resources:
        return []
    state = 'is not installed' if version is None else f'{version} has no pkg_resources'
    return [Finding(
        f'setuptools {state}',
        'mmengine needs pkg_resources to resolve `mmdet::...` and `mmseg::...` configs; '
        'setuptools 82 removed it',
        f'{PIP} install "setuptools{load_supported()["SETUPTOOLS"]}"',
    )]


def check_torchvision(version: str | None, run: Run) -> list[Finding]:
    """Tries to import torchvision, which kw_mm does not need but which breaks others if broken."""
    if version is None:
        return []
    failure = run('import torchvision')
    if failure is None:
        return []
    return [Finding(
        f'torchvision {version} does not fit the installed torch: {failure}',
        'packages that import torchvision when it is there fail; kw_mm does not need it',
        f'{PIP} uninstall torchvision',
    )]


def check_tokenizer(versions: Versions) -> list[Finding]:
    """Looks for the packages that mmsegmentation imports without declaring them."""
    missing = [package for package in ('ftfy', 'regex') if versions.get(package) is None]
    if versions.get('mmsegmentation') is None or not missing:
        return []
    return [Finding(
        ' and '.join(missing) + (' is' if len(missing) == 1 else ' are') + ' not installed',
        'mmsegmentation imports ftfy and regex but does not declare them, so pip leaves them out',
        f'{PIP} install {" ".join(missing)}',
    )]


def check_operators(run: Run) -> list[Finding]:
    """Runs a compiled operator of mmcv on the CPU and, where torch sees one, on the GPU."""
    failure = run(NMS_ON_CPU)
    if failure is not None:
        return [Finding(
            f'the compiled operators of mmcv do not work: {failure}',
            'detectors need them (nms, RoIAlign); a wheel built in isolation has none, and pip '
            'caches wheels without regard to the torch they were compiled for',
            f'{BUILD_MMCV} --again',
        )]
    failure = run(NMS_ON_GPU)
    if failure is not None:
        return [Finding(
            f'the operators of mmcv do not work on the GPU: {failure}',
            'detectors then run on the CPU only (CUDA_VISIBLE_DEVICES= hides the GPU)',
            'install the CUDA toolkit of the version torch.version.cuda tells, with nvcc, then '
            f'build mmcv again: {BUILD_MMCV} --again',
            error=False,
        )]
    return []


def check_imports(versions: Versions, run: Run) -> list[Finding]:
    """Imports what is installed, kw_mm last."""
    # The submodules bring in what the bare packages put off.
    modules = {
        'mmengine': 'mmengine.runner',
        'mmdet': 'mmdet.apis',
        'mmsegmentation': 'mmseg.apis, mmseg.utils',
        'kw_mm': 'kw_mm',
    }
    found = []
    for package, names in modules.items():
        package = load_supported()['distribution'](package, versions)
        if versions.get(package) is None:
            continue
        failure = run(f'import {names}')
        if failure is not None:
            found.append(Finding(
                f'`import {names}` fails: {failure}',
                f'nothing that uses {package} {versions[package]} can run',
                f'mend what the message names; if that is nothing you know, try '
                f'{PIP} install --force-reinstall --no-deps "{package}=={versions[package]}"'
                if package != 'kw_mm' else f'{PIP} install --no-build-isolation --no-deps -e .',
            ))
    return found


def check_cpu_products(run: Run) -> list[Finding]:
    """Looks for what kw_mm compiles for the CPU."""
    failure = run(CPU_PRODUCTS)
    if failure is None:
        return []
    return [Finding(
        f'the compiled products of kw_mm cannot be used: {failure}',
        "torch's own then mix kernels on the CPU, with the same results, slower",
        f'install a C++ compiler, then {PIP} install --no-deps -e . (for a checkout) or '
        f'{PIP} install --no-cache-dir --no-binary kw_mm --force-reinstall --no-deps kw_mm',
        error=False,
    )]


def check_all(versions: Versions, pins: Mapping[str, str] | None, has_pkg_resources: bool,
              run: Run) -> list[Finding]:
    """Runs every check that can tell something, cheap ones first.

    Args:
        versions: Installed version of each package, or None.
        pins: The exact versions expected, or None where any supported version will do.
        has_pkg_resources: Whether ``import pkg_resources`` finds a module.
        run: Runs code in a fresh interpreter, see :func:`run_python`.
    """
    found = check_present(versions, strict=pins is not None)
    found += check_doubles(versions)
    mmengine, mmcv = (load_supported()['distribution'](package, versions)
                      for package in ('mmengine', 'mmcv'))
    # The fork needs no pkg_resources.
    if mmengine == 'mmengine':
        found += check_setuptools(versions.get('setuptools'), has_pkg_resources)
    found += check_tokenizer(versions)
    if versions.get('packaging') is not None:
        found += check_ranges(versions)
    if pins is not None:
        told = {finding.what.split()[0] for finding in found}
        found += check_pins(versions, {name: pins[name] for name in pins if name not in told})
    if versions.get('torch') is None:
        return found
    found += check_torchvision(versions.get('torchvision'), run)
    if versions.get(mmcv) is not None:
        found += check_operators(run)
    # What is already known to be wrong would only be told again as an import that fails.
    if not any(finding.error for finding in found):
        found += check_imports(versions, run)
    if versions.get('kw_mm') is not None and not any(finding.error for finding in found):
        found += check_cpu_products(run)
    return found


def table(versions: Versions, pins: Mapping[str, str] | None) -> str:
    """Returns installed, supported and pinned versions as text."""
    names = load_supported()
    supported = {**names['SUPPORTED'], 'setuptools': names['SETUPTOOLS']}
    rows = [('package', 'installed', 'supported', 'tested')]
    # Of two that provide the same, the one that is there.
    shown = dict.fromkeys(
        names['distribution'](package, versions) for package in supported
        if package not in names['FORKS'].values())
    for package in (*shown, 'numpy', 'opencv-python', 'torchvision', 'kw_mm'):
        rows.append((package, versions.get(package) or '-', supported.get(package, 'any'),
                     (pins or {}).get(package, '-')))
    if pins is None:
        rows = [row[:3] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return '\n'.join(
        '  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Check that an environment can run kw_mm.')
    parser.add_argument('--pins', type=Path, metavar='FILE',
                        help='requirements file whose exact versions must be installed')
    args = parser.parse_args(argv)
    pins = read_pins(args.pins) if args.pins else None
    names = load_supported()
    packages = {'kw_mm', 'packaging', 'numpy', 'setuptools', 'torchvision', 'ftfy', 'regex',
                'opencv-python', *names['SUPPORTED'], *(pins or ())}
    versions = {package: names['installed_version'](package) for package in packages}
    found = check_all(versions, pins, importlib.util.find_spec('pkg_resources') is not None,
                      run_python)
    for finding in found:
        print(finding, file=sys.stderr)
    if any(finding.error for finding in found):
        return 1
    print(table(versions, pins))
    print('This environment can run kw_mm.')
    return 0


if __name__ == '__main__':
    sys.exit(main())
