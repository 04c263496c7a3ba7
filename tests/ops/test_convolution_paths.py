"""Every way to convolve each sample with its own kernel equals the reference.

Outputs and gradients, in every precision, both layouts and under autocast."""
import pytest
import torch
from kw_benchmark.parity import ParityError
from kw_benchmark.path_cases import find_path_cases, run_path_case

from kw_mm.ops import convolution_paths


@pytest.mark.parametrize('case', sum(find_path_cases('cpu').values(), []), ids=str)
def test_path(case):
    assert all(check.passed for check in run_path_case(case))


def test_a_wrong_path_is_found(monkeypatch):
    right = convolution_paths.rows
    monkeypatch.setattr(convolution_paths, 'rows', lambda x, kernel, *rest: right(
        x, kernel.flip(-1), *rest))
    with pytest.raises(ParityError, match='outputs, Geometry'):
        run_path_case(find_path_cases('cpu')['rows'][0])


@pytest.mark.parametrize('path', ['rows', 'sample_by_sample'])
def test_second_derivatives(path):
    torch.manual_seed(0)
    function = getattr(convolution_paths, path)
    x, kernel = (torch.randn(*shape, dtype=torch.float64, requires_grad=True)
                 for shape in ((2, 2, 4, 3), (2, 3, 2, 2, 2)))
    assert torch.autograd.gradgradcheck(
        lambda x, kernel: function(x, kernel, None, True, (2, 1), (1, 0), (1, 1), 1), (x, kernel))


@pytest.mark.parametrize('shape, size', [((2, 3, 7), (3,)), ((2, 3, 4, 5, 3), (2, 3, 1))])
def test_rows_in_one_and_three_dimensions(shape, size):
    torch.manual_seed(0)
    x, kernel = torch.randn(shape), torch.randn(2, 4, 3, *size)
    ones, twos = (1,) * len(size), (2,) * len(size)
    arguments = x, kernel, None, True, twos, ones, ones, 1
    torch.testing.assert_close(convolution_paths.rows(*arguments),
                               convolution_paths.grouped(*arguments))
