"""Run by test_triton.py: kernel assembly in Triton equals its reference."""
import math

import pytest
import torch
from triton_checks import DEVICE, check, check_precision, gradients, leaf, poison  # noqa: F401

from kw_mm import ops
from kw_mm.ops import reference, triton_assembly
from kw_mm.ops.triton_assembly import assemble_kernel
from kw_mm.ops.triton_support import is_usable

# N, (S, OG, IG), kernel size, cell's shape, n
CASES = {
    '3x3': (2, (9, 2, 3), (3, 3), (5, 7, 1, 1), 11),
    '1x1': (3, (1, 3, 1), (1, 1), (3, 5, 1, 1), 4),
    'one of everything': (1, (1, 1, 1), (1, 1), (1, 1, 1, 1), 1),
    'no sample': (0, (9, 1, 2), (3, 3), (2, 3, 1, 1), 4),
    'one sample, one mixture': (1, (1, 1, 1), (1, 1), (17, 3, 1, 1), 5),
    'one cell': (2, (3, 1, 1), (1, 3), (4, 6, 1, 1), 1),
    'cells with an extent': (3, (1, 2, 2), (3, 2), (4, 5, 3, 2), 7),
    'depthwise': (2, (9, 3, 1), (3, 3), (6, 1, 1, 1), 19),
    '1-d': (2, (3, 2, 1), (3,), (4, 9, 1), 5),
    '1-d, extent': (2, (1, 1, 2), (3,), (4, 9, 3), 5),
    '3-d': (2, (12, 1, 2), (2, 3, 2), (3, 5, 1, 1, 1), 6),
    '3-d, extent': (2, (1, 2, 1), (1, 3, 2), (3, 5, 1, 3, 2), 6),
    'aligned runs of columns': (2, (4, 1, 2), (2, 2), (3, 64, 1, 1), 16),
    'many rows and cells': (5, (9, 3, 1), (3, 3), (3, 5, 1, 1), 70),
    'many columns': (2, (1, 1, 1), (1, 1), (40, 33, 1, 1), 3),
}


def inputs(case, dtype=torch.float64):
    torch.manual_seed(0)
    num_samples, grid, kernel_size, cell_shape, num_cells = CASES[case]
    alpha = leaf(num_samples, math.prod(grid), num_cells, dtype=dtype)
    return (alpha, leaf(num_cells, *cell_shape, dtype=dtype)), (grid, kernel_size)


def with_sizes(function, sizes):
    return lambda alpha, cells: function(alpha, cells, *sizes)


@pytest.mark.parametrize('case', CASES)
def test_parity(case):
    leaves, sizes = inputs(case)
    assert is_usable(*leaves)
    out = check(with_sizes(assemble_kernel, sizes), with_sizes(reference.assemble_kernel, sizes),
                leaves)
    if len(sizes[1]) == 2 and math.prod(sizes[1]) > 1:
        assert out.permute(0, 1, 3, 4, 2).is_contiguous()
    else:
        assert out.is_contiguous()


@pytest.mark.parametrize('case', ['many rows and cells', 'many columns'])
def test_programs_with_several_tiles(case, monkeypatch):
    # As with large layers, which would take too long.
    monkeypatch.setattr(triton_assembly, 'NUM_PROGRAMS', 2)
    leaves, sizes = inputs(case)
    check(with_sizes(assemble_kernel, sizes), with_sizes(reference.assemble_kernel, sizes), leaves)


@pytest.mark.parametrize('case', ['3x3', 'cells with an extent', '1-d'])
def test_gradcheck(case):
    leaves, sizes = inputs(case)
    leaves = [t.detach()[:2, ...].clone() for t in leaves]
    leaves = [leaves[0][..., :2].clone().requires_grad_(), leaves[1].requires_grad_()]
    assert torch.autograd.gradcheck(with_sizes(assemble_kernel, sizes), leaves, fast_mode=True)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('case', ['3x3', 'cells with an extent', 'aligned runs of columns',
                                  'many rows and cells'])
def test_precision(case, dtype):
    leaves, sizes = inputs(case, dtype)
    check_precision(with_sizes(assemble_kernel, sizes), with_sizes(ops.assemble_kernel, sizes),
                    leaves)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize('case', ['3x3', 'aligned runs of columns'])
def test_autocast_as_for_a_product(case, dtype):
    leaves, sizes = inputs(case, torch.float32)

    def under_autocast(function):
        def call(*leaves):
            with torch.autocast(DEVICE, dtype):
                return function(*leaves, *sizes)
        return call

    out = under_autocast(assemble_kernel)(*leaves)
    assert out.dtype == dtype
    assert all(g.dtype == torch.float32 for g in gradients(out, torch.ones_like(out), leaves))
    check_precision(under_autocast(assemble_kernel), under_autocast(ops.assemble_kernel), leaves)
    # float64 is left alone, as by torch's products.
    leaves, sizes = inputs(case)
    assert under_autocast(assemble_kernel)(*leaves).dtype == torch.float64


def test_dtypes_must_agree():
    (alpha, cells), sizes = inputs('3x3', torch.float32)
    with pytest.raises(ValueError, match='alpha, cells must have one floating-point dtype'):
        assemble_kernel(alpha.double(), cells, *sizes)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert assemble_kernel(alpha.half(), cells, *sizes).dtype == torch.bfloat16


@pytest.mark.parametrize('case', ['3x3', 'cells with an extent', 'aligned runs of columns',
                                  'no sample'])
def test_everything_is_written_and_nothing_else(case, poison):  # noqa: F811
    for dtype in (torch.float64, torch.bfloat16):
        (alpha, cells), sizes = inputs(case, dtype)
        out = assemble_kernel(alpha, cells, *sizes)
        out.backward(torch.ones_like(out))


def test_strided_inputs():
    leaves, sizes = inputs('3x3')
    strided = [t.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
               for t in leaves]
    assert not any(t.is_contiguous() for t in strided)
    check(with_sizes(assemble_kernel, sizes), with_sizes(reference.assemble_kernel, sizes), strided)


@pytest.mark.parametrize('case', ['3x3', 'cells with an extent', '3-d'])
def test_strided_gradients(case):
    leaves, sizes = inputs(case)
    expected, out = reference.assemble_kernel(*leaves, *sizes), assemble_kernel(*leaves, *sizes)
    wide = torch.randn(*(2 * size for size in out.shape), dtype=out.dtype, device=DEVICE)
    every_second = wide[tuple(slice(0, None, 2) for _ in out.shape)]
    dims = list(range(3, out.dim()))
    # Positions that are no arithmetic sequence are copied first.
    swapped = torch.randn_like(out.permute(0, 1, 2, *reversed(dims))).contiguous().permute(
        0, 1, 2, *reversed(dims))
    for grad in (torch.ones(()).to(out).expand_as(out), out.new_ones(out.shape), every_second,
                 swapped):
        for actual, wanted in zip(
                torch.autograd.grad(out, leaves, grad, retain_graph=True),
                torch.autograd.grad(expected, leaves, grad, retain_graph=True)):
            torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)


def test_only_what_needs_a_gradient():
    (alpha, cells), sizes = inputs('3x3')
    assert not assemble_kernel(alpha.detach(), cells.detach(), *sizes).requires_grad
    for leaves in ((alpha.detach(), cells), (alpha, cells.detach())):
        check_leaf = [t for t in leaves if t.requires_grad]
        out = assemble_kernel(*leaves, *sizes)
        assert torch.autograd.grad(out.sum(), check_leaf)[0].shape == check_leaf[0].shape


def test_same_bits_every_time():
    leaves, sizes = inputs('many columns', torch.float32)
    runs = [gradients(out := assemble_kernel(*leaves, *sizes), torch.ones_like(out), leaves)
            for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs))


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiled_without_a_graph_break(dynamic):
    leaves, sizes = inputs('3x3')

    def layer(alpha, cells):
        assert is_usable(alpha, cells)
        return assemble_kernel(2 * alpha, cells, *sizes)

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    check(compiled, lambda alpha, cells: reference.assemble_kernel(2 * alpha, cells, *sizes),
          leaves)


@pytest.mark.parametrize('case', ['3x3', '1-d', 'no sample'])
def test_operators_are_described_truly(case):
    (alpha, cells), (grid, kernel_size) = inputs(case)
    alpha, cells = alpha.detach(), cells.detach()
    grad = torch.randn_like(reference.assemble_kernel(alpha, cells, grid, kernel_size))
    tests = ('test_schema', 'test_faketensor')
    kw_mm = torch.ops.kw_mm
    torch.library.opcheck(kw_mm.assemble, (alpha, cells, grid, kernel_size, torch.float32),
                          test_utils=tests)
    torch.library.opcheck(kw_mm.assemble_grad_alpha, (grad, cells, grid, torch.float32),
                          test_utils=tests)
    torch.library.opcheck(kw_mm.assemble_grad_cells,
                          (grad, alpha, cells.shape, grid, torch.float32), test_utils=tests)


def test_what_is_usable():
    good = torch.zeros(1, device=DEVICE)
    assert is_usable(good, good.half(), good.double())
    assert not is_usable(good, good.long())
    assert not is_usable(good, good.to('meta'))
