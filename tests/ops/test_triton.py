"""The Triton kernels. Their tests are in ``triton_*.py`` beside this and run in new processes.

Triton decides when it is imported whether to interpret, and this process, or another test in
it, may have imported it (torch does). Nothing is skipped where Triton is merely missing: it is
one of the pinned packages.
"""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='Triton exists for Linux only')

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)

SUITES = ['triton_assembly_suite.py', 'triton_attention_suite.py']


def run(arguments: list[str], tmp_path: Path, interpret: bool) -> None:
    """Runs python in a new process; all it wrote is shown if it fails."""
    environment = {**os.environ, 'TRITON_INTERPRET': str(int(interpret)), 'OMP_NUM_THREADS': '1',
                   'TRITON_CACHE_DIR': str(tmp_path), 'PYTHONPATH': str(HERE.parents[1])}
    done = subprocess.run([sys.executable, *arguments], env=environment, cwd=HERE.parents[1],
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900)
    assert done.returncode == 0, done.stdout


def pytest_arguments(suite: str) -> list[str]:
    return ['-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(HERE / suite)]


@pytest.mark.slow
@pytest.mark.parametrize('suite', SUITES)
def test_interpreted(suite: str, tmp_path: Path) -> None:
    run(pytest_arguments(suite), tmp_path, interpret=True)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GPU, reason='needs a CUDA device of capability 8.0')
@pytest.mark.parametrize('suite', SUITES)
def test_on_gpu(suite: str, tmp_path: Path) -> None:
    run(pytest_arguments(suite), tmp_path, interpret=False)


@pytest.mark.slow
def test_compiled_without_a_gpu(tmp_path: Path) -> None:
    run(pytest_arguments('triton_compile_suite.py'), tmp_path, interpret=False)


def test_kw_mm_works_without_triton(tmp_path: Path) -> None:
    run(['-c', """
import sys
sys.modules['triton'] = None  # its import fails
import torch
import kw_mm
from kw_mm.ops.triton_support import is_usable
assert not is_usable(torch.zeros(1))
kw_mm.KWConv2d(4, 4, 3)(torch.zeros(2, 4, 5, 5))
"""], tmp_path, interpret=False)
