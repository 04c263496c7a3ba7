"""On a GPU every path equals the method; ``python tools/benchmark gpu`` runs the same cases."""
import pytest
from kw_benchmark import profiling
from kw_benchmark.gpu_cases import find_cases, run_case
from kw_benchmark.path_cases import find_path_cases, run_path_case
from kw_benchmark.schedule import Findings

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize('case', find_cases('cuda'), ids=str)
def test_outputs_and_gradients(case):
    assert all(check.passed for check in run_case(case))


@pytest.mark.parametrize('cases', find_path_cases('cuda').values(), ids=find_path_cases('cuda'))
def test_ways_to_convolve(cases):
    for case in cases:
        assert all(check.passed for check in run_path_case(case)), case


def test_nothing_waits_for_a_result():
    profiling.check_synchronisation('cuda', Findings())


@pytest.mark.parametrize('with_triton', [False, True])
def test_no_more_kernels_than_declared(with_triton):
    profiling.compare_launches('cuda', Findings(), with_triton)
