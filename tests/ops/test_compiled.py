"""The compiled products equal torch's, write exactly their results, and check memory before they
read it."""
import math
import platform
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import geometries

from kw_mm import ops
from kw_mm.ops import compiled, layout, operators, reference

CAPABILITY = torch.backends.cpu.get_cpu_capability()
# All that this machine supports, not only the best.
SETS = list(compiled.INSTRUCTION_SETS)
SETS = SETS[SETS.index(CAPABILITY):] if CAPABILITY in SETS else []


@pytest.fixture(params=SETS)
def instruction_set(request, monkeypatch):
    library = compiled.load(request.param)
    monkeypatch.setattr(compiled, '_library', lambda: (request.param, library))
    return request.param


@pytest.fixture
def few_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(platform.machine() != 'x86_64' or not SETS, reason='written for such CPUs')
def test_this_environment_has_them():
    # Otherwise all other tests would test torch's products.
    assert compiled.instruction_set() == CAPABILITY


def strided(draw, *shape):
    """Random numbers in a view into NaN, whose last dimension is contiguous."""
    gaps = [draw(st.integers(0, 3)) for _ in shape]
    space = torch.full([size + gap for size, gap in zip(shape, gaps)], math.nan)
    view = space[tuple(slice(gap, None) for gap in gaps)]
    return space, view.copy_(torch.randn(shape))


def anyhow(draw, *shape):
    """The same with any strides: steps, another order of dimensions, expanded rows."""
    kind = draw(st.sampled_from(['rows', 'steps', 'permuted', 'expanded']))
    if kind == 'rows':
        return strided(draw, *shape)[1]
    if kind == 'expanded':
        dim = draw(st.integers(0, len(shape) - 1))
        once = [1 if i == dim else size for i, size in enumerate(shape)]
        return strided(draw, *once)[1].expand(shape)
    if kind == 'permuted':
        return strided(draw, *shape[::-1])[1].permute(*range(len(shape) - 1, -1, -1))
    space = torch.full([2 * size for size in shape], math.nan)
    return space[tuple(slice(None, None, 2) for _ in shape)].copy_(torch.randn(shape))


def close(actual, exact, terms):
    """As close to the exact result as sums of so many terms in single precision must be."""
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=1e-6 * math.sqrt(terms + 1))


@settings(deadline=None, max_examples=300)
@given(data=st.data(), num_blocks=st.integers(1, 3), rows=st.integers(0, 15),
       num_cells=st.integers(1, 20), width=st.integers(1, 300), threads=st.integers(1, 3),
       by_block=st.booleans(), scaled=st.booleans(), some=st.booleans(), half=st.booleans())
def test_mixtures(data, num_blocks, rows, num_cells, width, threads, by_block, scaled, some, half):
    torch.manual_seed(0)
    index = torch.randperm(num_cells)[:data.draw(st.integers(0, num_cells))] if some else None
    shape = (num_blocks, rows, num_cells) if by_block else (rows, num_cells)
    alpha, blocks = anyhow(data.draw, *shape), anyhow(data.draw, num_blocks, num_cells, width)
    blocks = blocks.bfloat16() if half else blocks
    scales = torch.randn(num_blocks, rows) if scaled else None
    space, out = strided(data.draw, num_blocks, rows, width)
    out.fill_(math.nan)
    num_gaps = space.numel() - out.numel()
    exact = ((alpha if index is None else alpha[..., index]).double()
             @ (blocks if index is None else blocks[:, index]).double())
    exact = exact if scales is None else exact * scales.double().unsqueeze(-1)
    for name in SETS:
        with pytest.MonkeyPatch.context() as patch:
            library = compiled.load(name)
            patch.setattr(compiled, '_library', lambda name=name, lib=library: (name, lib))
            patch.setattr(compiled, '_num_threads', lambda work: threads)
            compiled.mix_blocks(alpha, blocks, out, index, scales)
        close(out, exact, num_cells)
        # The whole result is written, and nothing else.
        assert space.isnan().sum() == num_gaps


@settings(deadline=None, max_examples=200)
@given(data=st.data(), rows=st.integers(0, 15), num_cells=st.integers(1, 11),
       size=st.integers(1, 100) | st.integers(2000, 9000), threads=st.integers(1, 3))
def test_sums_of_products(data, rows, num_cells, size, threads):
    torch.manual_seed(0)
    grads, cells = (anyhow(data.draw, count, size) for count in (rows, num_cells))
    exact = grads.double() @ cells.double().T
    for name in SETS:
        with pytest.MonkeyPatch.context() as patch:
            library = compiled.load(name)
            patch.setattr(compiled, '_library', lambda name=name, lib=library: (name, lib))
            patch.setattr(compiled, '_num_threads', lambda work: threads)
            first, again = (compiled.sum_products(grads, cells) for _ in range(2))
        close(first, exact, size)
        assert torch.equal(first, again)


def test_rows_in_several_dimensions(instruction_set):
    # In the order of kernels, (N, OG, c_out, S, IG, c_in), with one block for each c_out.
    torch.manual_seed(0)
    alpha, blocks = torch.randn(2 * 3 * 2 * 2, 5), torch.randn(4, 5, 17)
    kernel = torch.full((2, 2, 4, 3, 2, 17), math.nan)
    compiled.mix_blocks(alpha, blocks, kernel.permute(2, 0, 3, 1, 4, 5))
    exact = (alpha.double() @ blocks.double()).view(4, 2, 3, 2, 2, 17)
    close(kernel, exact.permute(1, 3, 0, 2, 4, 5), 5)


@pytest.mark.parametrize('change, message', [
    (dict(alpha=torch.ones(3, 4)), 'alpha'), (dict(alpha=torch.ones(1, 3, 5)), 'alpha'),
    (dict(blocks=torch.ones(2, 4, 7)), 'alpha'), (dict(out=torch.ones(2, 3, 8)), 'out'),
    (dict(out=torch.ones(2, 2, 7)), 'out'), (dict(out=torch.ones(2, 7, 3).mT), 'out'),
    (dict(out=torch.ones(2, 3, 7).double()), 'out'), (dict(scales=torch.ones(3, 2)), 'scales'),
    (dict(alpha=torch.ones(3, 5, device='meta')), 'alpha')])
def test_what_does_not_fit_is_refused(change, message):
    given = dict(alpha=torch.ones(3, 5), blocks=torch.ones(2, 5, 7), out=torch.ones(2, 3, 7))
    compiled.mix_blocks(**given)
    with pytest.raises(ValueError, match=f'^{message} must'):
        compiled.mix_blocks(**{**given, **change})


def test_an_index_out_of_range_is_refused():
    with pytest.raises((IndexError, RuntimeError)):
        compiled.mix_blocks(torch.ones(3, 5), torch.ones(2, 5, 7), torch.ones(2, 3, 7),
                            torch.tensor([0, 5]))


# Kernels from the compiled products and from torch's.

def single(*shape):
    return torch.randn(*shape, requires_grad=True)


def errors(function, twin, inputs, *rest):
    """Relative errors of outputs and gradients, from a twin in double precision."""
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
    if not operators.ARE_REGISTERED:
        pytest.skip('torch below 2.4 registers no operators, and assembles with its own products')
    made = []
    for name in ('kw_mm_mix', 'kw_mm_sum_products'):
        function = getattr(compiled._library()[1], name)
        monkeypatch.setattr(compiled._library()[1], name, lambda *args, f=function, n=name: (
            made.append(n), f(*args)))
    return made


KERNELS = [
    # A cell covers some channels of a kernel, at one position or at all.
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
@given(data=st.data(), g=geometries(), scaled=st.booleans(), rows_first=st.booleans())
def test_kernels_of_any_strides(data, g, scaled, rows_first):
    torch.manual_seed(0)
    # Kernels of layers with folded norms, from cells as inference stores them.
    grid, cell = g['grid'], (6, 16 * g['cell_shape'][1], *g['cell_shape'][2:])
    alpha = anyhow(data.draw, g['batch'], math.prod(grid), g['num_cells'])
    cells = torch.randn(g['num_cells'], *cell)
    if rows_first:
        cells = cells.transpose(0, 1).contiguous().transpose(0, 1)
    scale = torch.randn(grid[1] * 6) if scaled else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, 'MIN_CELLS', 0)
        kernel = ops.assemble_kernel(alpha, cells, grid, g['kernel_size'], scale)
    exact = reference.assemble_kernel(alpha.double(), cells.double(), grid, g['kernel_size'])
    if scaled:
        exact = exact * scale.double().view(-1, *(1,) * (exact.dim() - 2))
    close(kernel, exact, g['num_cells'])


@settings(deadline=None, max_examples=100)
@given(data=st.data(), g=geometries())
def test_gradients_of_kernels_of_any_strides(data, g):
    # A gradient without contiguous rows was read as if it had them: gradients had errors as large
    # as themselves, and for an expanded one memory beyond it was read.
    torch.manual_seed(0)
    grid, cell = g['grid'], (4, 16 * g['cell_shape'][1], *g['cell_shape'][2:])
    alpha = anyhow(data.draw, g['batch'], math.prod(grid), g['num_cells'])
    cells = anyhow(data.draw, g['num_cells'], *cell)
    grad = anyhow(data.draw, g['batch'], grid[1] * 4, grid[2] * cell[1], *g['kernel_size'])
    pieces = layout.cut_kernel(grad, grid, cell)
    rows = pieces.double().reshape(alpha.shape[0] * alpha.shape[1], -1 if alpha.numel() else 1)
    if not alpha.numel():
        return
    close(operators.assemble_grad_alpha(pieces, cells).flatten(0, 1),
          rows @ cells.double().flatten(1).T, rows.shape[1])
    close(operators.assemble_grad_cells(pieces, alpha).flatten(1),
          alpha.double().flatten(0, 1).T @ rows, len(rows))


@pytest.mark.parametrize('batch', [0, 1, 3])
def test_bases_in_single_precision(batch, calls):
    torch.manual_seed(0)
    # Two output channels and three positions, each with its own mixtures.
    mixtures = torch.tensor([0, 1, 2, 0, 1, 2])
    hidden, logits = torch.randn(batch, 4).relu(), torch.randn(batch, 3, 6)
    norms = ops.logit_norms(logits)
    bases = torch.randn(len(mixtures), 5, 33)
    exact = torch.einsum('bk,ukw->buw', torch.cat((hidden, torch.ones(batch, 1)), 1).double(),
                         bases.double()) / norms[:, mixtures].double().unsqueeze(-1)
    found = ops.mix_bases(hidden, logits, bases, (3, 1, 1), (2, 33, 3))
    close(found.transpose(2, 3).flatten(1, 2), exact, 5)
    assert calls == ['kw_mm_mix'] * (batch > 0)


# Which of them are used.

@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_other_precisions_are_left_to_torch(dtype, calls):
    alpha, cells = torch.randn(1, 2, 6, dtype=dtype), torch.randn(6, 8, 16, 1, 1, dtype=dtype)
    assert ops.assemble_kernel(alpha, cells, (1, 2, 1), (1, 1)).dtype == dtype
    assert not calls


def test_cells_in_bfloat16_give_single_kernels(calls):
    torch.manual_seed(0)
    alpha, cells = torch.randn(3, 2, 6), torch.randn(6, 8, 16, 1, 1).bfloat16()
    kernel = ops.assemble_kernel(alpha, cells, (1, 2, 1), (1, 1), dtype=torch.float32)
    assert calls == ['kw_mm_mix']
    close(kernel, reference.assemble_kernel(alpha.double(), cells.double(), (1, 2, 1), (1, 1)), 6)


def without_library(monkeypatch, file):
    monkeypatch.setattr(compiled, '__file__', str(file))
    compiled._library.cache_clear()


@pytest.fixture
def fresh_library():
    yield
    compiled._library.cache_clear()


def test_without_a_compiler_torch_serves(monkeypatch, tmp_path, fresh_library):
    torch.manual_seed(0)
    alpha, cells = torch.randn(1, 2, 6), torch.randn(6, 8, 16, 1, 1)
    kernel = ops.assemble_kernel(alpha, cells, (1, 2, 1), (1, 1))
    without_library(monkeypatch, tmp_path / 'compiled.py')
    assert compiled.instruction_set() is None
    close(ops.assemble_kernel(alpha, cells, (1, 2, 1), (1, 1)), kernel.double(), 6)


@pytest.mark.skipif(not SETS, reason='nothing is compiled for such CPUs')
def test_what_was_compiled_from_another_source_is_refused(monkeypatch, tmp_path, fresh_library):
    # After an update without a reinstall, a changed structure corrupted memory.
    here = Path(compiled.__file__)
    for file in here.parent.glob('_cpu_*.so'):
        shutil.copy(file, tmp_path)
    source = (here.parent / 'cpu.cpp').read_bytes()
    # Line endings do not matter.
    (tmp_path / 'cpu.cpp').write_bytes(source.replace(b'\n', b'\r\n'))
    without_library(monkeypatch, tmp_path / 'compiled.py')
    assert compiled.instruction_set() == CAPABILITY
    (tmp_path / 'cpu.cpp').write_bytes(source + b'// changed')
    without_library(monkeypatch, tmp_path / 'compiled.py')
    with pytest.warns(RuntimeWarning, match='another version of kw_mm.*pip install'):
        assert compiled.instruction_set() is None
