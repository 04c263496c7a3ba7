"""The compiled products equal torch's own, write all that is theirs and nothing else, and stand
back from what they cannot see."""
import math
import platform

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import geometries
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from kw_mm import ops
from kw_mm.ops import cpu_products, reference
from kw_mm.ops.backend import takes_cpu_products

CAPABILITY = torch.backends.cpu.get_cpu_capability()
# All that this machine takes, not the best alone.
SETS = list(cpu_products.INSTRUCTION_SETS)
SETS = SETS[SETS.index(CAPABILITY):] if CAPABILITY in SETS else []


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    library = cpu_products.load(request.param)
    monkeypatch.setattr(cpu_products, '_library', lambda: (request.param, library))
    return request.param


@pytest.fixture
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(platform.machine() != 'x86_64' or not SETS, reason='written for such CPUs')
def test_this_environment_has_them():
    # Else every other test would be of torch's products.
    assert cpu_products.instruction_set() == CAPABILITY


def strided(draw, *shape):
    """Random numbers of a shape, a view into NaN; the last dimension is in order."""
    gaps = [draw(st.integers(0, 3)) for _ in shape]
    space = torch.full([size + gap for size, gap in zip(shape, gaps)], math.nan)
    view = space[tuple(slice(gap, None) for gap in gaps)]
    return space, view.copy_(torch.randn(shape))


def close(actual, exact, terms):
    """As close to the exact result as sums of so many terms in single precision have to be."""
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6 * math.sqrt(terms + 1))


@settings(deadline=None, max_examples=300)
@given(data=st.data(), num_blocks=st.integers(1, 3), rows=st.integers(0, 15),
       num_cells=st.integers(1, 20), width=st.integers(1, 300), threads=st.integers(1, 3),
       by_block=st.booleans(), scaled=st.booleans(), some=st.booleans())
def test_mixtures(data, num_blocks, rows, num_cells, width, threads, by_block, scaled, some):
    torch.manual_seed(0)
    index = torch.randperm(num_cells)[:data.draw(st.integers(1, num_cells))] if some else None
    num_mixed = num_cells if index is None else len(index)
    shape = (num_blocks, rows, num_mixed) if by_block else (rows, num_mixed)
    alpha, blocks = strided(data.draw, *shape)[1], strided(
        data.draw, num_blocks, num_cells, width)[1]
    scales = torch.randn(num_blocks, rows) if scaled else None
    space, out = strided(data.draw, num_blocks, rows, width)
    out.fill_(math.nan)
    num_gaps = space.numel() - out.numel()
    exact = alpha.double() @ (blocks if index is None else blocks[:, index]).double()
    exact = exact if scales is None else exact * scales.double().unsqueeze(-1)
    for name in SETS:
        with pytest.MonkeyPatch.context() as patch:
            library = cpu_products.load(name)
            patch.setattr(cpu_products, '_library', lambda name=name, lib=library: (name, lib))
            patch.setattr(cpu_products, '_num_threads', lambda work: threads)
            assert cpu_products.mix_blocks(alpha, blocks, out, index, scales) is out
        close(out, exact, num_cells)
        # All of the result is written and nothing beside it.
        assert space.isnan().sum() == num_gaps


@settings(deadline=None, max_examples=200)
@given(data=st.data(), rows=st.integers(0, 15), num_cells=st.integers(1, 11),
       size=st.integers(1, 100) | st.integers(2000, 9000), threads=st.integers(1, 3))
def test_sums_of_products(data, rows, num_cells, size, threads):
    torch.manual_seed(0)
    grads, cells = (strided(data.draw, count, size)[1] for count in (rows, num_cells))
    exact = grads.double() @ cells.double().T
    for name in SETS:
        with pytest.MonkeyPatch.context() as patch:
            library = cpu_products.load(name)
            patch.setattr(cpu_products, '_library', lambda name=name, lib=library: (name, lib))
            patch.setattr(cpu_products, '_num_threads', lambda work: threads)
            first, again = (cpu_products.sum_products(grads, cells) for _ in range(2))
        close(first, exact, size)
        assert torch.equal(first, again)


def test_rows_in_several_dimensions(instruction_set):
    # As kernels have them: (N, OG, c_out, S, IG, c_in), c_out of them a block each.
    torch.manual_seed(0)
    alpha, blocks = torch.randn(2 * 3 * 2 * 2, 5), torch.randn(4, 5, 17)
    kernel = torch.full((2, 2, 4, 3, 2, 17), math.nan)
    cpu_products.mix_blocks(alpha, blocks, kernel.permute(2, 0, 3, 1, 4, 5))
    exact = (alpha.double() @ blocks.double()).view(4, 2, 3, 2, 2, 17)
    close(kernel, exact.permute(1, 3, 0, 2, 4, 5), 5)


def test_large_tensors_get_all_that_they_ask_for():
    like = torch.zeros(1)
    shape = 3, cpu_products.MIN_LARGE // 8 + 1
    for _ in range(2):
        out = cpu_products.large_empty(shape, like)
        assert out.shape == shape and out.dtype == like.dtype and out.is_contiguous()
        out.fill_(1)
        assert out.sum(dtype=torch.float64) == out.numel()
    meta = cpu_products.large_empty(shape, like.to('meta'))
    assert meta.device.type == 'meta'


# Kernels, with the compiled products beside those of torch.

def single(*shape):
    return torch.randn(*shape, requires_grad=True)


def errors(function, twin, inputs, *rest):
    """Distances of outputs and gradients from a twin in double precision, relative."""
    twice = [t.detach().double().requires_grad_() for t in inputs]
    out, exact = function(*inputs, *rest), twin(*twice, *rest)
    weights = torch.randn_like(exact)
    found = [out.detach(), *torch.autograd.grad((out * weights.float()).sum(), inputs)]
    right = [exact.detach(), *torch.autograd.grad((exact * weights).sum(), twice)]
    return [((a.double() - b).norm() / b.norm()).item() if b.norm() else a.norm().item()
            for a, b in zip(found, right)]


def collected(alpha, cells, *rest):
    return ops.assemble_kernel(alpha, ops.collect_gradients(cells), *rest)


@pytest.fixture
def calls(monkeypatch):
    """Which of the compiled products were called by assembly."""
    made = []
    for name in ('kw_mm_mix', 'kw_mm_sum_products'):
        function = getattr(cpu_products._library()[1], name)
        monkeypatch.setattr(cpu_products._library()[1], name, lambda *args, f=function, n=name: (
            made.append(n), f(*args)))
    return made


KERNELS = [
    # A cell is a piece of a kernel's channels, with a position of its own; or all positions.
    ((32, 12, 32, 1, 1), (9, 2, 2), (3, 3)), ((5, 8, 48, 1, 1), (1, 1, 3), (1, 1)),
    ((5, 8, 48, 1, 1), (1, 3, 1), (1, 1)), ((4, 6, 5, 3, 3), (1, 2, 2), (3, 3)),
    ((4, 24, 1, 5, 5), (1, 2, 1), (5, 5)), ((32, 3, 24, 1), (5, 1, 1), (5,)),
    ((33, 64, 256, 1, 1), (1, 2, 1), (1, 1)), ((40, 32, 512, 1, 1), (1, 1, 1), (1, 1)),
]


@pytest.mark.parametrize('shape, grid, kernel_size', KERNELS)
@pytest.mark.parametrize('batch', [1, 3])
def test_assembly_in_single_precision(shape, grid, kernel_size, batch, calls):
    torch.manual_seed(0)
    alpha, cells = single(batch, math.prod(grid), shape[0]), single(*shape)
    found = errors(collected, reference.assemble_kernel, (alpha, cells), grid, kernel_size)
    assert calls == ['kw_mm_mix', 'kw_mm_sum_products', 'kw_mm_mix']
    ops.use_cpu_products(False)
    try:
        own = errors(collected, reference.assemble_kernel, (alpha, cells), grid, kernel_size)
    finally:
        ops.use_cpu_products()
    assert len(calls) == 3
    assert all(a <= 2 * b + 1e-7 for a, b in zip(found, own)), (found, own)


@settings(deadline=None, max_examples=100)
@given(geometries())
def test_assembly_of_any_geometry(g):
    torch.manual_seed(0)
    cell = 4, 16 * g['cell_shape'][1], *g['cell_shape'][2:]
    alpha = single(g['batch'], math.prod(g['grid']), g['num_cells'])
    found = errors(collected, reference.assemble_kernel, (alpha, single(g['num_cells'], *cell)),
                   g['grid'], g['kernel_size'])
    assert max(found) < 1e-5


@settings(deadline=None, max_examples=100)
@given(g=geometries(), scaled=st.booleans(), rows_first=st.booleans(), given_out=st.booleans())
def test_mixtures_in_place(g, scaled, rows_first, given_out):
    torch.manual_seed(0)
    grid, cell = g['grid'], (6, 16 * g['cell_shape'][1], *g['cell_shape'][2:])
    alpha = torch.randn(g['batch'], math.prod(grid), g['num_cells'])
    cells = torch.randn(g['num_cells'], *cell)
    if rows_first:
        cells = cells.transpose(0, 1).contiguous().transpose(0, 1)
    scale = torch.randn(grid[1] * 6) if scaled else None
    assert ops.mixes_in_place(alpha, cells, (1, *grid[1:]))
    assert not ops.mixes_in_place(alpha, cells[:, :, :0], grid)
    kernel = ops.mix_in_place(
        alpha, cells, grid, (lambda shape: torch.full(shape, math.nan)) if given_out else None,
        scale)
    exact = reference.assemble_kernel(alpha.double(), cells.double(), grid, g['kernel_size'])
    if scaled:
        exact = exact * scale.double().view(-1, *(1,) * (exact.dim() - 2))
    close(kernel, exact.flatten(3).transpose(2, 3), g['num_cells'])


@pytest.mark.parametrize('batch', [0, 1, 3])
def test_bases_in_single_precision(batch, calls):
    torch.manual_seed(0)
    mixtures = torch.tensor([0, 1, 2, 2, 1, 0])
    hidden, norms = torch.randn(batch, 4).relu(), torch.rand(batch, 3) + 1
    bases = torch.randn(len(mixtures), 5, 33)
    exact = torch.einsum('bk,ukw->buw', torch.cat((hidden, torch.ones(batch, 1)), 1).double(),
                         bases.double()) / norms[:, mixtures].double().unsqueeze(-1)
    found = ops.mix_bases(hidden, norms, bases, mixtures,
                          lambda shape: torch.full(shape, math.nan))
    close(found, exact, 5)
    assert calls == ['kw_mm_mix'] * (batch > 0)


# What they must leave to torch.

def test_tensors_that_are_not_taken():
    plain = torch.ones(2)
    assert takes_cpu_products(plain, torch.nn.Parameter(plain, False))
    for other in (plain.double(), plain.bfloat16(), plain.to('meta'), plain.to_sparse(),
                  plain.clone().requires_grad_()):
        assert not takes_cpu_products(plain, other)
    with torch.no_grad():
        assert takes_cpu_products(plain.clone().requires_grad_())
    with FakeTensorMode() as mode:
        assert not takes_cpu_products(mode.from_tensor(plain))


def test_whoever_watches_sees_torchs_products():
    plain, taken = torch.ones(2), []

    def ask(x):
        taken.append(takes_cpu_products(plain))
        return x * 2

    with FlopCounterMode(display=False):
        ask(plain)
    torch.jit.trace(ask, plain, check_trace=False)
    torch.func.vmap(ask)(torch.ones(2, 2))
    torch.func.grad(lambda x: ask(x).sum())(plain)
    with forward_ad.dual_level():
        ask(plain)
    assert taken == [False] * 5
    ask(plain)
    assert taken.pop()


def test_flops_of_assembly_are_counted():
    alpha, cells = torch.randn(1, 2, 6), torch.randn(6, 8, 16, 1, 1)
    with FlopCounterMode(display=False) as counter:
        ops.assemble_kernel(alpha, cells, (1, 2, 1), (1, 1))
    assert counter.get_total_flops() == 2 * 2 * 6 * 8 * 16


def test_without_a_compiler_torch_serves(monkeypatch, tmp_path):
    torch.manual_seed(0)
    alpha, cells = torch.randn(1, 2, 6), torch.randn(6, 8, 16, 1, 1)
    kernel = ops.assemble_kernel(alpha, cells, (1, 2, 1), (1, 1))
    monkeypatch.setattr(cpu_products, '__file__', str(tmp_path / 'cpu_products.py'))
    cpu_products._library.cache_clear()
    try:
        assert cpu_products.instruction_set() is None
        assert not takes_cpu_products(alpha)
        close(ops.assemble_kernel(alpha, cells, (1, 2, 1), (1, 1)), kernel.double(), 6)
    finally:
        cpu_products._library.cache_clear()
