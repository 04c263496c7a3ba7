"""Run by test_triton.py: the dispatcher's operators in Triton equal their reference."""
import math
import warnings

import pytest
import torch
from optimised import optimised, outputs, randomise
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_checks import (
    BASES_KERNEL,
    DEVICE,
    KERNELS,
    check,
    check_functions,
    check_precision,
    gradients,
    launches,  # noqa: F401
    leaf,
    poison,  # noqa: F401
)

from kw_mm import KWConv2d, ops
from kw_mm.ops import cuda, operators, products, reference, triton_assembly
from kw_mm.ops.layout import cut_kernel, has_positions_last
from kw_mm.ops.triton_support import dot_precision, is_usable

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
    'aligned cells with an extent': (2, (1, 2, 2), (3, 3), (3, 16, 3, 3), 5),
    'many rows and cells': (5, (9, 3, 1), (3, 3), (3, 5, 1, 1), 70),
    'many columns': (2, (1, 1, 1), (1, 1), (40, 33, 1, 1), 3),
}

# Triton's interpreter is not asked by the dispatcher for bfloat16.
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == 'cuda')

pytestmark = pytest.mark.usefixtures('launches')


def inputs(case, dtype=torch.float64):
    torch.manual_seed(0)
    num_samples, grid, kernel_size, cell_shape, num_cells = CASES[case]
    alpha = leaf(num_samples, math.prod(grid), num_cells, dtype=dtype)
    return (alpha, leaf(num_cells, *cell_shape, dtype=dtype)), (grid, kernel_size)


def few(case):
    """Like ``inputs``, for one sample and few small cells."""
    (alpha, cells), sizes = inputs(case)
    return [t.detach().clone().requires_grad_() for t in (alpha[:1, :, :2], cells[:2, :2, :3])
            ], sizes


def with_sizes(function, sizes):
    return lambda alpha, cells: function(alpha, cells, *sizes)


def check_assembly(leaves, sizes):
    return check(with_sizes(ops.assemble_kernel, sizes),
                 with_sizes(reference.assemble_kernel, sizes), leaves)


@pytest.mark.parametrize('case', CASES)
def test_parity(case, launches):  # noqa: F811
    leaves, sizes = inputs(case)
    out = check_assembly(leaves, sizes)
    assert launches == dict.fromkeys(KERNELS, 1) if out.numel() else not launches
    is_last = has_positions_last(sizes[0], leaves[1].shape)
    assert (out.movedim(2, -1) if is_last else out).is_contiguous()


@pytest.mark.parametrize('case', ['many rows and cells', 'many columns'])
def test_programs_with_several_tiles(case, monkeypatch):
    # As for large layers, which would take too long here.
    monkeypatch.setattr(triton_assembly, 'NUM_PROGRAMS', 2)
    check_assembly(*inputs(case))


@pytest.mark.parametrize('case, scaled', [('3x3', False), ('cells with an extent', True),
                                          ('1-d', True)])
def test_gradients_of_two_orders(case, scaled):
    tensors, sizes = few(case)
    if scaled:
        tensors.append(leaf(sizes[0][1] * tensors[1].shape[1]))

    def kernel(alpha, cells, scale=None):
        return ops.assemble_kernel(alpha, cells, *sizes, scale)

    assert torch.autograd.gradcheck(kernel, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(kernel, tensors, fast_mode=True)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('case', ['3x3', 'cells with an extent', 'aligned runs of columns',
                                  'many rows and cells'])
def test_precision(case, dtype, launches):  # noqa: F811
    leaves, sizes = inputs(case, dtype)
    check_precision(with_sizes(ops.assemble_kernel, sizes), leaves)
    assert launches == dict.fromkeys(KERNELS, 1)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('alpha_dtype', ['single', 'same'])
@pytest.mark.parametrize('case', ['3x3', 'aligned cells with an extent', 'many rows and cells'])
def test_precision_of_the_functions(case, alpha_dtype, dtype, launches):  # noqa: F811
    (alpha, cells), sizes = inputs(case, torch.float32)
    check_functions(alpha if alpha_dtype == 'single' else alpha.to(dtype), cells.to(dtype), *sizes)
    assert launches == dict.fromkeys(KERNELS, 1)


@pytest.mark.parametrize('dtype', DTYPES[1:])
def test_both_dtypes_of_a_mixed_product(dtype, launches):  # noqa: F811
    # With cells in half precision, mixing weights and their gradients stay single, because these
    # sums exceed the range of half precision.
    alpha, cells = leaf(1, 2, 6, dtype=torch.float32), leaf(6, 32, 64, 1, 1, dtype=dtype)
    kernel = ops.assemble_kernel(alpha, cells, (1, 2, 1), (1, 1))
    assert kernel.dtype == dtype
    grads = torch.autograd.grad(kernel, (alpha, cells), torch.full_like(kernel, 8192))
    assert grads[0].dtype == torch.float32 and grads[1].dtype == dtype
    torch.testing.assert_close(grads[0], 8192 * cells.float().flatten(1).sum(1).expand(1, 2, -1))
    assert grads[0].abs().max() > torch.finfo(torch.float16).max
    assert launches == dict.fromkeys(KERNELS, 1)


@pytest.mark.parametrize('dtype', DTYPES[1:])
@pytest.mark.parametrize('case', ['3x3', 'aligned runs of columns'])
def test_autocast_as_for_a_product(case, dtype, launches):  # noqa: F811
    leaves, sizes = inputs(case, torch.float32)

    def under_autocast(*leaves):
        with torch.autocast(DEVICE, dtype):
            return ops.assemble_kernel(*leaves, *sizes)

    out = under_autocast(*leaves)
    assert out.dtype == dtype
    assert all(g.dtype == torch.float32 for g in gradients(out, torch.ones_like(out), leaves))
    assert launches == dict.fromkeys(KERNELS, 1)
    check_precision(under_autocast, leaves)
    # float64 stays float64, as in torch's products.
    leaves, sizes = inputs(case)
    assert under_autocast(*leaves).dtype == torch.float64


@pytest.mark.parametrize('dtype', DTYPES)
def test_scaled_kernels(dtype, launches):  # noqa: F811
    # A norm's factors stay single under autocast, which once made kernels single. Kernels have the
    # same strides as without factors, which a product of permuted tensors does not ensure.
    for case in ('3x3', 'one of everything', 'depthwise', 'cells with an extent'):
        (alpha, cells), sizes = inputs(case, torch.float32)
        alpha, cells = alpha.detach(), cells.detach().to(dtype)
        scale = torch.rand(sizes[0][1] * cells.shape[1], device=DEVICE) + 1
        out = ops.assemble_kernel(alpha, cells, *sizes, scale)
        plain = ops.assemble_kernel(alpha, cells, *sizes)
        assert out.dtype == dtype and out.stride() == plain.stride()
        factors = scale.view(-1, *(1,) * (plain.dim() - 2))
        torch.testing.assert_close(out, (plain * factors).to(dtype))
        with FakeTensorMode() as mode:
            fake = ops.assemble_kernel(*map(mode.from_tensor, (alpha, cells)), *sizes,
                                      mode.from_tensor(scale))
        assert (out.stride(), out.dtype) == (fake.stride(), fake.dtype)
    assert launches == {'_assemble_kernel': 8}


@pytest.mark.parametrize('case', ['3x3', 'cells with an extent', 'aligned runs of columns',
                                  'no sample'])
def test_everything_is_written_and_nothing_else(case, poison):  # noqa: F811
    for dtype in (torch.float64, torch.bfloat16):
        (alpha, cells), sizes = inputs(case, dtype)
        alpha, cells = alpha.detach(), cells.detach()
        out = triton_assembly.assemble(alpha, cells, *sizes, None, cells.dtype)
        pieces = cut_kernel(torch.ones_like(out), sizes[0], cells.shape[1:])
        triton_assembly.assemble_grad_alpha(pieces, cells)
        triton_assembly.assemble_grad_cells(pieces, alpha)


@pytest.mark.parametrize('dtype', [torch.float64, *DTYPES])
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('case', ['3x3', 'cells with an extent', 'many rows and cells',
                                  'no sample'])
def test_logits_in_one_kernel(case, scaled, tied, dtype, launches):  # noqa: F811
    (alpha, cells), sizes = inputs(case, torch.float64)
    alpha, cells = alpha.detach(), cells.detach().to(dtype)
    logits = torch.randn(*alpha.shape[:2], alpha.shape[2] + 1).to(alpha.device, dtype)
    tie = (torch.rand_like(alpha[0] if len(alpha) else alpha.new_ones(alpha.shape[1:])).to(dtype),
           torch.tensor(0.3, dtype=torch.float64, device=DEVICE)) if tied else (None, None)
    scale = torch.rand(sizes[0][1] * cells.shape[1], device=DEVICE) + 1 if scaled else None
    arguments = (*tie, cells, *sizes, scale, dtype)
    out = operators.assemble_logits(logits, *arguments)
    exact = products.assemble_logits(
        logits.double(), *(t if t is None else t.double() for t in tie), cells.double(), *sizes,
        scale if scale is None else scale.double(), torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=(
        1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps * exact.abs().max().item()
        if exact.numel() else 0))
    assert out.stride() == products.assemble_logits(logits, *arguments).stride()
    assert launches == ({'_assemble_kernel': 1} if out.numel() else {})


@pytest.mark.parametrize('dtype', [torch.float64, *DTYPES])
@pytest.mark.parametrize('grid, cell_kernel, kernel', [((9, 2, 3), 1, (3, 3)),
                                                       ((1, 3, 1), 9, (3, 3)),
                                                       ((1, 2, 2), 1, (1, 1))])
@pytest.mark.parametrize('batch', [0, 1, 19])
def test_bases(batch, grid, cell_kernel, kernel, dtype, launches):  # noqa: F811
    torch.manual_seed(0)
    out_groups, in_groups, width = *grid[1:], 37
    shape = (out_groups * 2, in_groups * width, *kernel)
    hidden = torch.randn(batch, 21, device=DEVICE, dtype=dtype).relu()
    hidden[:, ::4] = 0  # of no sample
    logits = torch.randn(batch, math.prod(grid), 70, device=DEVICE, dtype=dtype)
    bases = torch.randn(out_groups * 2 * grid[0] * cell_kernel * in_groups, 22, width,
                        device=DEVICE, dtype=dtype)
    out = operators.mix_bases(hidden, logits, bases, grid, shape, dtype)
    exact = products.mix_bases(hidden.double(), logits.double(), bases.double(), grid, shape,
                               torch.float64)
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=(
        1e-12 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps * exact.abs().max().item()
        if exact.numel() else 0))
    assert out.stride() == exact.stride()
    assert launches == ({BASES_KERNEL: 1} if batch else {})


def test_strided_inputs():
    leaves, sizes = inputs('3x3')
    strided = [t.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
               for t in leaves]
    assert not any(t.is_contiguous() for t in strided)
    check_assembly(strided, sizes)


@pytest.mark.parametrize('case', ['3x3', 'cells with an extent', '3-d'])
def test_strided_gradients(case):
    leaves, sizes = inputs(case)
    expected = reference.assemble_kernel(*leaves, *sizes)
    out = ops.assemble_kernel(*leaves, *sizes)
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


@pytest.mark.parametrize('case', ['3x3', 'cells with an extent', 'depthwise',
                                  'aligned runs of columns', 'aligned cells with an extent'])
def test_pieces_with_any_strides(case, launches):  # noqa: F811
    # Pieces in rows with a gap, as they are gathered, and in any other order. Their dimensions may
    # differ from a kernel's, and no piece is copied.
    (alpha, cells), (grid, _) = inputs(case)
    alpha, cells = alpha.detach(), cells.detach()
    shape = (len(alpha), *grid, *cells.shape[1:3], math.prod(cells.shape[3:]))
    rows = math.prod(shape[:4])
    gathered = torch.randn(rows, cells[0].numel() + 64, dtype=cells.dtype,
                           device=DEVICE)[:, :cells[0].numel()]
    pieces = gathered.view(shape)
    orders = [pieces, pieces.contiguous()]
    for order in ((6, 5, 4, 3, 2, 1, 0), (0, 3, 2, 1, 6, 5, 4), (4, 0, 5, 2, 6, 1, 3)):
        orders.append(pieces.permute(order).contiguous().permute(
            [order.index(dim) for dim in range(7)]))
    for actual in orders:
        torch.testing.assert_close(triton_assembly.assemble_grad_alpha(actual, cells),
                                   products.assemble_grad_alpha(pieces, cells))
        torch.testing.assert_close(triton_assembly.assemble_grad_cells(actual, alpha),
                                   products.assemble_grad_cells(pieces, alpha))
    # Rows of one product for many layers.
    torch.testing.assert_close(
        triton_assembly.assemble_grad_cells(gathered.view(1, 1, rows, 1, 1, 1, -1),
                                            alpha.flatten(0, 1)[None]).view(-1, *shape[4:]),
        products.assemble_grad_cells(pieces, alpha))
    assert launches == {'_grad_alpha_kernel': 5, '_grad_cells_kernel': 6}


def test_offsets_beyond_32_bits(launches):  # noqa: F811
    # Offsets between rows that exceed 32 bits; the memory in between is never used. Output groups
    # were once counted in 32 bits. Gathered gradients of a large batch have a group for each row.
    apart = 2**29 + 16
    space = torch.empty(5 * apart, dtype=torch.float16, device=DEVICE)
    gathered = space.as_strided((5, 48), (apart, 1))
    torch.manual_seed(0)
    rows, alpha = torch.randn(5, 48, device=DEVICE).half(), torch.randn(1, 5, 3, device=DEVICE)
    gathered.copy_(rows)
    for shape in ((1, 1, 5, 1, 1, 1, 48), (1, 5, 1, 1, 3, 4, 4), (1, 1, 1, 5, 48, 1, 1)):
        torch.testing.assert_close(
            triton_assembly.assemble_grad_cells(gathered.view(shape), alpha),
            products.assemble_grad_cells(rows.view(shape), alpha))
    # The same for the columns of a cell.
    torch.testing.assert_close(
        triton_assembly.assemble_grad_cells(gathered.view(1, 1, 1, 1, 5, 6, 8), alpha[:, :1]),
        products.assemble_grad_cells(rows.view(1, 1, 1, 1, 5, 6, 8), alpha[:, :1]))
    assert launches == {'_grad_cells_kernel': 4}


def test_only_what_needs_a_gradient(launches):  # noqa: F811
    (alpha, cells), sizes = inputs('3x3')
    assert not ops.assemble_kernel(alpha.detach(), cells.detach(), *sizes).requires_grad
    for leaves, name in (((alpha.detach(), cells), '_grad_cells_kernel'),
                         ((alpha, cells.detach()), '_grad_alpha_kernel')):
        launches.clear()
        check_leaf = [t for t in leaves if t.requires_grad]
        out = ops.assemble_kernel(*leaves, *sizes)
        assert torch.autograd.grad(out.sum(), check_leaf)[0].shape == check_leaf[0].shape
        assert launches == {'_assemble_kernel': 1, name: 1}


def test_same_bits_every_time():
    leaves, sizes = inputs('many columns', torch.float32)
    runs = [gradients(out := ops.assemble_kernel(*leaves, *sizes), torch.ones_like(out), leaves)
            for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs))


# Callers of the dispatcher.

def layer_loss(alpha, cells):
    return ops.assemble_kernel(2 * alpha, cells, (9, 2, 3), (3, 3)).sin().sum()


def expected_loss(alpha, cells):
    return reference.assemble_kernel(2 * alpha, cells, (9, 2, 3), (3, 3)).sin().sum()


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiled_without_a_graph_break(dynamic, launches):  # noqa: F811
    (alpha, cells), _ = inputs('3x3')
    torch._dynamo.reset()
    compiled = torch.compile(layer_loss, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        launches.clear()
        leaves = torch.cat([alpha, alpha])[:batch].detach().requires_grad_(), cells
        check(compiled, expected_loss, leaves)
        assert launches == dict.fromkeys(KERNELS, 1)


def test_function_transforms(launches):  # noqa: F811
    leaves = inputs('3x3')[0]
    expected = torch.autograd.grad(expected_loss(*leaves), leaves)
    torch.testing.assert_close(torch.func.grad(layer_loss, (0, 1))(*leaves), expected)
    assert launches == dict.fromkeys(KERNELS, 1)
    # One gradient for each sample, also of shared tensors.
    launches.clear()
    each = torch.func.vmap(torch.func.grad(layer_loss, (0, 1)), (0, None))(
        leaves[0][:, None], leaves[1])
    torch.testing.assert_close(each[0].flatten(0, 1), expected[0])
    torch.testing.assert_close(each[1].sum(0), expected[1])
    assert set(launches) == KERNELS
    (alpha, cells), _ = few('3x3')
    vector = torch.randn_like(alpha)
    _, product = torch.func.vjp(torch.func.grad(layer_loss), alpha, cells)
    torch.testing.assert_close(product(vector)[0], torch.autograd.functional.vhp(
        lambda a: expected_loss(a, cells), alpha, vector)[1])


@pytest.mark.parametrize('case', ['3x3', '1-d', 'cells with an extent', 'depthwise', 'no sample'])
def test_the_dispatcher_s_own_checks(case, launches):  # noqa: F811
    # Schema and fakes; for one case also autograd and compilers.
    tests = {} if case == '3x3' else dict(test_utils=('test_schema', 'test_faketensor'))
    (alpha, cells), sizes = inputs(case)
    pieces = cut_kernel(ops.assemble_kernel(alpha, cells, *sizes).detach(), sizes[0],
                        cells.shape[1:]).requires_grad_()
    for operator, arguments in (
            (torch.ops.kw_mm.assemble, (alpha, cells, *sizes, None, cells.dtype)),
            (torch.ops.kw_mm.assemble_grad_alpha, (pieces, cells)),
            (torch.ops.kw_mm.assemble_grad_cells, (pieces, alpha))):
        torch.library.opcheck(operator.default, arguments, **tests)
    assert set(launches) == (KERNELS if pieces.numel() else set())


def small_network():
    torch.manual_seed(0)
    network = nn.Sequential(KWConv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
                            KWConv2d(16, 16, 1), nn.BatchNorm2d(16)).to(DEVICE)
    return randomise(network)


def test_optimised_layers_with_cells(launches):  # noqa: F811
    network, x = small_network(), torch.randn(2, 8, 5, 5, device=DEVICE)
    expected = outputs(network, x)
    assert launches == {'_assemble_kernel': 2}
    ops.use_triton(False)
    torch.testing.assert_close(outputs(network, x), expected, rtol=1e-4, atol=1e-5)
    ops.use_triton()
    twin, report = optimised(network, 0)
    assert all(layer.folded and not layer.num_bases for layer in report.layers)
    launches.clear()
    torch.testing.assert_close(outputs(twin, x), expected, rtol=1e-4, atol=1e-5)
    assert launches == {'_assemble_kernel': 2}
    launches.clear()
    torch._dynamo.reset()
    compiled = torch.compile(twin, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(outputs(compiled, x), expected, rtol=1e-4, atol=1e-5)
    assert launches == {'_assemble_kernel': 2}
    with torch.autocast(DEVICE, DTYPES[1]):
        launches.clear()
        half, expected = outputs(twin, x), outputs(network, x)
    assert launches == {'_assemble_kernel': 4}
    assert half[0].dtype == DTYPES[1]
    torch.testing.assert_close(half[0].float(), expected[0].float(), rtol=0.02, atol=0.02)


def test_training_gathers_the_gradient_of_cells(launches):  # noqa: F811
    leaves = [*inputs('3x3')[0], inputs('3x3')[0][0]]
    sizes = inputs('3x3')[1]
    expected = sum(reference.assemble_kernel(alpha, leaves[1], *sizes).sin().sum()
                   for alpha in leaves[::2])
    loss = 0
    for alpha in leaves[::2]:
        cells = ops.collect_gradients(leaves[1])
        loss = loss + ops.assemble_kernel(alpha, cells, *sizes).sin().sum()
    torch.testing.assert_close(torch.autograd.grad(loss, leaves),
                               torch.autograd.grad(expected, leaves))
    # Cells get the gradient of both layers at once.
    assert launches == {'_assemble_kernel': 2, '_grad_alpha_kernel': 2, '_grad_cells_kernel': 1}


# Which tensors Triton takes.

def test_the_switch(launches, monkeypatch):  # noqa: F811
    (alpha, cells), sizes = inputs('3x3')
    pieces = cut_kernel(torch.randn_like(ops.assemble_kernel(alpha, cells, *sizes)), sizes[0],
                        cells.shape[1:])
    calls = (('assemble', (alpha, cells, *sizes, None, cells.dtype)),
             ('assemble_grad_alpha', (pieces, cells)), ('assemble_grad_cells', (pieces, alpha)))
    expected = [getattr(products, name)(*arguments) for name, arguments in calls]

    def run():
        launches.clear()
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            actual = [getattr(operators, name)(*arguments) for name, arguments in calls]
        torch.testing.assert_close(actual, expected)
        return [str(w.message) for w in caught]

    for enabled in (True, False, True):
        ops.use_triton(enabled)
        assert run() == []
        assert launches == (dict.fromkeys(KERNELS, 1) if enabled else {})
    # For other tensors torch computes, with one warning.
    monkeypatch.setattr(cuda, 'is_usable', lambda *tensors: False)
    message, = run()
    assert 'Triton kernels were asked for but cannot take torch.float64 on ' in message
    assert run() == [] and not launches
    ops.use_triton(False)
    assert run() == []
    ops.use_triton()
    assert len(run()) == 1


def test_what_is_usable():
    good = torch.zeros(1, device=DEVICE)
    assert is_usable(good, good.half(), good.double())
    assert is_usable(good.bfloat16()) == (DEVICE == 'cuda')
    assert not is_usable(good, good.long())
    assert not is_usable(good, good.to('meta'))


@pytest.mark.parametrize('switch', ['legacy', 'new'])
def test_tf32_as_for_a_product(switch):
    # torch refuses to read the old switch after the new one was used.
    matmul = torch.backends.cuda.matmul
    name, on, off = (('allow_tf32', True, False) if switch == 'legacy' else
                     ('fp32_precision', 'tf32', 'ieee'))
    before = matmul.fp32_precision
    try:
        for value, expected in ((on, 'tf32'), (off, 'ieee')):
            setattr(matmul, name, value)
            assert dot_precision(torch.float32) == expected
            assert dot_precision(torch.float64) == dot_precision(torch.float16) == 'ieee'
    finally:
        matmul.fp32_precision = before
