"""The Triton kernels. Their tests are in ``triton_*.py`` beside this and run in new processes.

Triton decides when it is imported whether to interpret, and this process, or another test in
it, may have imported it (torch does). Nothing is skipped where Triton is merely missing: it is
one of the pinned packages.
"""
from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from kw_mm.ops import cuda, products

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='Triton exists for Linux only')

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


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
def test_interpreted(tmp_path: Path) -> None:
    run(pytest_arguments('triton_assembly_suite.py'), tmp_path, interpret=True)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_GPU, reason='needs a CUDA device of capability 8.0')
def test_on_gpu(tmp_path: Path) -> None:
    run(pytest_arguments('triton_assembly_suite.py'), tmp_path, interpret=False)


@pytest.mark.slow
def test_compiled_without_a_gpu(tmp_path: Path) -> None:
    run(pytest_arguments('triton_compile_suite.py'), tmp_path, interpret=False)


@pytest.mark.slow
def test_kw_mm_works_without_triton(tmp_path: Path) -> None:
    run(['-c', """
import sys
sys.modules['triton'] = None  # its import fails
import torch
import kw_mm
from kw_mm.ops.triton_support import is_usable
assert not is_usable(torch.zeros(1))
kw_mm.KWConv2d(4, 4, 3)(torch.zeros(2, 4, 5, 5))
# The compiler is as much to import as all the rest together.
assert 'torch._dynamo' not in sys.modules
"""], tmp_path, interpret=False)


@pytest.mark.parametrize('wanted', [0, 1])
def test_the_switch_in_the_environment(wanted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # What GPUs compute, asked for with tensors of which Triton takes none: said once, if at all.
    monkeypatch.delenv('TRITON_INTERPRET', raising=False)
    monkeypatch.setenv('KW_MM_TRITON', str(wanted))
    # The module once more, for it asks the environment when it is imported.
    spec = importlib.util.spec_from_file_location('kw_mm.ops.another_cuda', cuda.__file__)
    another = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(another)
    inputs = (torch.rand(2, 9, 4), torch.rand(4, 3, 5, 1, 1), (9, 1, 1), (3, 3), None,
              torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for _ in range(2):
            torch.testing.assert_close(another.assemble(*inputs), products.assemble(*inputs))
    assert [w.category for w in caught] == [RuntimeWarning] * wanted
    another.use_triton(False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        another.assemble(*inputs)
