"""Packaging. Version and supported ranges are read from ``kw_mm/versions.py``."""
from __future__ import annotations

import hashlib
import os
import platform
import runpy
import shutil
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent

# Run, not imported: importing kw_mm would need torch.
VERSIONS = runpy.run_path(str(ROOT / 'kw_mm' / 'versions.py'))

# What `kw_mm::...` bases of configs read, and where OpenMMLab's packages have theirs: `kw_mm/.mim`.
MIM_FILES = ('configs', 'tools', 'model-index.yml')


def link_mim_files() -> None:
    """Makes ``kw_mm/.mim`` point at configs and tools, or copies them if it cannot.

    Always made anew, so that a copy is never stale.
    """
    mim = ROOT / 'kw_mm' / '.mim'
    if mim.is_dir():
        shutil.rmtree(mim)
    mim.mkdir()
    for name in MIM_FILES:
        source = ROOT / name
        try:
            os.symlink(os.path.join('..', '..', name), mim / name, source.is_dir())
        # Some file systems, and Windows without the privilege, have no symbolic links.
        except (OSError, NotImplementedError):
            if source.is_dir():
                shutil.copytree(source, mim / name)
            elif source.exists():
                shutil.copy2(source, mim / name)


class BuildPy(build_py):
    """Adds ``.mim``: links for an editable install, and through them files in a wheel."""

    def run(self) -> None:
        link_mim_files()
        super().run()


def cpu_products() -> list[Extension]:
    """One file for each instruction set, of which the package loads what the machine takes.

    Without a compiler, or with one that does not know these options, torch's own products serve.
    """
    if platform.machine() != 'x86_64':
        return []
    options = dict(avx2=['-mavx2', '-mfma'], avx512=['-mavx512f', '-mfma'])
    # As kw_mm/ops/compiled.py computes it, which refuses what was compiled from another source.
    source = Path('kw_mm/ops/cpu.cpp')
    built_from = hashlib.sha256(b'\n'.join((ROOT / source).read_bytes().splitlines())).hexdigest()
    return [Extension(f'kw_mm.ops._cpu_{name}', [str(source)],
                      define_macros=[('KW_MM_BUILT_FROM', f'"{built_from[:16]}"')],
                      extra_compile_args=['-O3', '-g0', '-std=c++14', '-fopenmp', *flags],
                      extra_link_args=['-fopenmp'], optional=True)
            for name, flags in options.items()]


def readme() -> str:
    path = ROOT / 'README.md'
    return path.read_text(encoding='utf-8') if path.exists() else ''


def ranged(*packages: str) -> list[str]:
    return [package + VERSIONS['SUPPORTED'][package] for package in packages]


# What writes and runs files for other runtimes (docs/deployment.md).
DEPLOY = ['onnx>=1.17', 'onnxscript>=0.5', 'onnxruntime>=1.20', 'openvino>=2025.0']

TEST = ['pytest>=7', 'pytest-cov', 'pytest-xdist', 'hypothesis', 'ruff', 'mypy',
        'triton; platform_system == "Linux"', *DEPLOY]

# pip knows nothing of one package serving for another: an extra that asked for mmcv would install
# upstream's over the fork's files. So who wants either says which.
EXTRAS = {
    'openmmlab': [
        *ranged(*VERSIONS['FORKS']),
        'setuptools' + VERSIONS['SETUPTOOLS'],
        # Imported by mmsegmentation 1.2, which does not declare them.
        'ftfy',
        'regex',
    ],
    'onedl': ranged(*VERSIONS['FORKS'].values()),
    'deploy': DEPLOY,
    'test': TEST,
    # Kept from when they asked for upstream's packages.
    'det': [],
    'seg': [],
    'all': TEST,
}

setup(
    name='kw_mm',
    version=VERSIONS['__version__'],
    description='KernelWarehouse dynamic convolution for MMDetection and MMSegmentation',
    long_description=readme(),
    long_description_content_type='text/markdown',
    author='kw_mm contributors',
    url='https://arxiv.org/abs/2406.07879',
    license='Apache-2.0',
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        *(f'Programming Language :: Python :: 3.{minor}' for minor in range(10, 14)),
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
    keywords='dynamic convolution, KernelWarehouse, MMDetection, MMSegmentation, PyTorch',
    license_files=['LICENSE'],
    packages=find_packages(include=['kw_mm', 'kw_mm.*']),
    package_data={
        'kw_mm': [
            'py.typed',
            'ops/cpu.cpp',
            '.mim/model-index.yml',
            *(f'.mim/{folder}/**/*.{ending}'
              for folder in ('configs', 'tools') for ending in ('py', 'sh', 'yml', 'md')),
        ],
    },
    cmdclass={'build_py': BuildPy},
    ext_modules=cpu_products(),
    python_requires=VERSIONS['REQUIRES_PYTHON'],
    install_requires=[*ranged('torch'), 'numpy', 'packaging'],
    extras_require=EXTRAS,
)
