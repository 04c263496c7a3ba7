"""Every path of the fast functions equals the reference, chosen one by one: small random cases
alone would take few of them."""
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from parity import check, geometries, leaf

from kw_mm import ops
from kw_mm.ops import convolution, products, reference
from kw_mm.ops import convolution_paths as paths


def by_rows(cells):
    """The same cells, stored row by row as for inference."""
    return cells.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()


def collected(alpha, cells, *rest):
    return ops.assemble_kernel(alpha, ops.collect_gradients(cells), *rest)


# Assembly.

@settings(deadline=None, max_examples=120)
@given(g=geometries(), width=st.integers(1, 20), sum_width=st.integers(1, 4),
       rows_first=st.booleans(), function=st.sampled_from([ops.assemble_kernel, collected]))
def test_assembly_in_blocks(g, width, sum_width, rows_first, function):
    # Blocks of one row, of several and of the whole cell; sums of one part and of several.
    torch.manual_seed(0)
    alpha = leaf(g['batch'], math.prod(g['grid']), g['num_cells'])
    cells = leaf(g['num_cells'], 6, *g['cell_shape'][1:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, 'MIN_BLOCKED_SIZE', 0)
        patch.setattr(products, 'MIN_CELLS', 0)
        patch.setattr(products, 'ROWS_TO_CELLS', 0)
        patch.setattr(products, 'BLOCK_WIDTH', width)
        patch.setattr(products, 'SUM_WIDTH', sum_width)
        check(function, reference.assemble_kernel, (alpha, by_rows(cells) if rows_first else cells),
              g['grid'], g['kernel_size'])


# The first two are large enough for blocks; in the second, a row is a block of its own.
@pytest.mark.parametrize('shape, grid, kernel_size', [
    ((3, 128, 128, 1, 1), (2, 1, 1), (1, 2)), ((2, 16, 1024, 1, 1), (1, 2, 1), (1, 1)),
    ((2, 43, 43, 3, 3), (1, 1, 1), (3, 3)), ((2, 127, 128, 1, 1), (1, 1, 2), (1, 1))])
@pytest.mark.parametrize('rows_first', [False, True])
@pytest.mark.parametrize('function', [ops.assemble_kernel, collected])
def test_assembly_of_large_cells(shape, grid, kernel_size, rows_first, function):
    torch.manual_seed(0)
    alpha, cells = leaf(3, math.prod(grid), shape[0]), leaf(*shape)
    check(function, reference.assemble_kernel, (alpha, by_rows(cells) if rows_first else cells),
          grid, kernel_size)


@settings(deadline=None, max_examples=60)
@given(geometries())
def test_cutting_is_the_inverse_of_assembly(g):
    torch.manual_seed(0)
    num_mixtures = math.prod(g['grid'])
    # One cell for each mixture, so that the result is known.
    cells = torch.randn(num_mixtures, *g['cell_shape'])
    alpha = torch.eye(num_mixtures).expand(g['batch'], -1, -1)
    kernel = ops.assemble_kernel(alpha, cells, g['grid'], g['kernel_size'])
    pieces = ops.cut_kernel(kernel, g['grid'], g['cell_shape'])
    expected = cells.flatten(3).expand(g['batch'], -1, -1, -1, -1).unflatten(1, g['grid'])
    assert torch.equal(pieces, expected)
    assert pieces.numel() == 0 or pieces.data_ptr() == kernel.data_ptr()


def test_gradcheck_of_collected_cells():
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(
        lambda alpha, cells: collected(alpha, cells, (4, 1, 2), (2, 2)),
        (leaf(2, 8, 3), leaf(3, 2, 1, 1, 1)))


# Bases.

@settings(deadline=None, max_examples=120)
@given(g=geometries(), batch=st.sampled_from([0, 1, 3]), hidden=st.integers(1, 4),
       scaled=st.booleans(), dead=st.sampled_from(['none', 'some', 'all']), blocked=st.booleans())
def test_bases_give_the_kernels_of_the_attention(g, batch, hidden, scaled, dead, blocked):
    torch.manual_seed(0)
    grid, num_mixtures = g['grid'], math.prod(g['grid'])
    weight, bias = leaf(num_mixtures, g['num_cells'] + 1, hidden), leaf(
        num_mixtures, g['num_cells'] + 1)
    cells = leaf(g['num_cells'], *g['cell_shape'])
    scale = leaf(grid[1] * g['cell_shape'][0]) if scaled else None
    # Values before the ReLU, none of which is 0.
    before = leaf(batch, hidden).detach().abs() + 0.1
    if dead != 'none':
        before[torch.rand_like(before) < (0.5 if dead == 'some' else 2)] *= -1

    def kernels(weight, bias, cells, before, scale):
        logits = torch.einsum('mnh,bh->bmn', weight, before.relu()) + bias
        bases = ops.contract_bases(weight[:, :-1], bias[:, :-1], cells, grid, scale)
        return ops.mix_bases(
            before.relu(), logits, bases, grid,
            (grid[1] * cells.shape[1], grid[2] * cells.shape[2], *g['kernel_size']))

    def literal(weight, bias, cells, before, scale):
        logits = torch.einsum('mnh,bh->bmn', weight, before.relu()) + bias
        zeros = logits.new_zeros(num_mixtures, g['num_cells'])
        alpha = reference.mixing_weights(logits, zeros, logits.new_zeros(()))
        kernel = reference.assemble_kernel(alpha, cells, grid, g['kernel_size'])
        return kernel if scale is None else kernel * scale.view(-1, *(1,) * (kernel.dim() - 2))

    with pytest.MonkeyPatch.context() as patch:
        if blocked:
            patch.setattr(products, 'MIN_BLOCKED_SIZE', 0)
            patch.setattr(products, 'MIN_CELLS', 0)
            patch.setattr(products, 'ROWS_TO_CELLS', 0)
            patch.setattr(products, 'BLOCK_WIDTH', 1)
        check(kernels, literal, (weight, bias, cells, before.requires_grad_(), scale))


# Convolution.

# Limits with which each path for several samples is taken, if the geometry allows it.
BOUNDS = dict(im2col=dict(IM2COL_POSITIONS=10**9, GROUPED_POSITIONS=0),
              sample_by_sample=dict(IM2COL_POSITIONS=0, GROUPED_POSITIONS=10**9),
              grouped=dict(IM2COL_POSITIONS=0, GROUPED_POSITIONS=0))


def position_major(kernel):
    """The same kernels, stored position before input channel."""
    return kernel.detach().movedim(2, -1).contiguous().movedim(-1, 2).requires_grad_()


@pytest.mark.parametrize('bounds', BOUNDS)
@settings(deadline=None, max_examples=60)
@given(g=geometries(), reordered=st.booleans(), channels_last=st.booleans())
def test_convolution(bounds, g, reordered, channels_last):
    torch.manual_seed(0)
    x = leaf(g['batch'], g['cell_shape'][1] * g['groups'], *g['size'])
    kernel = leaf(g['batch'], 2 * g['groups'], g['cell_shape'][1], *g['kernel_size'])
    bias = leaf(kernel.shape[1]) if g['bias'] else None
    if reordered:
        kernel = position_major(kernel)
    if channels_last and x.dim() == 4:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in BOUNDS[bounds].items():
            patch.setattr(convolution, name, value)
        check(ops.dynamic_conv, reference.dynamic_conv, (x, kernel, bias), g['stride'],
              g['padding'], g['dilation'], g['groups'])


@settings(deadline=None, max_examples=40)
@given(batch=st.sampled_from([1, 2, 3]), stride=st.integers(1, 3), reordered=st.booleans(),
       channels_last=st.booleans(), padding=st.integers(0, 1))
def test_pointwise_convolution(batch, stride, reordered, channels_last, padding):
    torch.manual_seed(0)
    x, kernel, bias = leaf(batch, 3, 5, 4), leaf(batch, 2, 3, 1, 1), leaf(2)
    if reordered:
        kernel = position_major(kernel)
    if channels_last:
        x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    check(ops.dynamic_conv, reference.dynamic_conv, (x, kernel, bias), (stride, 1),
          (padding, padding), (1, 1), 1)


@pytest.mark.parametrize('batch, stride', [(1, 1), (1, 2), (3, 1), (3, 2)])
def test_pointwise_where_products_are_narrow(batch, stride, monkeypatch):
    monkeypatch.setattr(convolution, 'NARROW_PRODUCTS', True)
    monkeypatch.setattr(convolution, 'LEAST_CHANNELS', 3)
    monkeypatch.setattr(convolution, 'LEAST_WORK', 0)
    monkeypatch.setattr(convolution, 'IM2COL_POSITIONS', 0)
    torch.manual_seed(0)
    single = [leaf(batch, 3, 6, 5), leaf(batch, 4, 3, 1, 1), leaf(4)]
    single = [t.detach().float().requires_grad_() for t in single]
    geometry = (stride, stride), (0, 0), (1, 1), 1
    assert convolution.choose_path(*single[:2], *geometry) is (
        paths.sample_by_sample if batch > 1 else paths.one)
    double = [t.detach().double().requires_grad_() for t in single]
    y, expected = ops.dynamic_conv(*single, *geometry), reference.dynamic_conv(*double, *geometry)
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected.float())
    for found, wanted in zip(torch.autograd.grad(y.sin().sum(), single),
                             torch.autograd.grad(expected.sin().sum(), double)):
        torch.testing.assert_close(found, wanted.float())


@pytest.mark.parametrize('narrow', [False, True])
def test_which_pointwise_kernels_are_convolved(narrow, monkeypatch):
    monkeypatch.setattr(convolution, 'NARROW_PRODUCTS', narrow)

    def is_convolved(batch, c_in, c_out, size, *, training=False, dtype=torch.float32, turn=False):
        x = torch.empty(batch, c_in, size, size, dtype=dtype)
        kernel = torch.empty(batch, c_out, c_in, 1, 1, dtype=dtype, requires_grad=training)
        x = x.contiguous(memory_format=torch.channels_last) if turn else x
        path = convolution.choose_path(x, kernel, (1, 1), (0, 0), (1, 1), 1)
        return path is not paths.pointwise

    assert is_convolved(1, 256, 1024, 14) is narrow
    assert is_convolved(8, 256, 1024, 14, training=True) is narrow
    assert is_convolved(1, 512, 2048, 7) is narrow
    assert not is_convolved(2, 512, 2048, 7, training=True)             # more kernel than map
    assert not is_convolved(1, 64, 64, 56)                              # small
    assert not is_convolved(1, 16, 96, 112)                             # few channels
    assert not is_convolved(1, 64, 256, 200)                            # large maps
    assert not is_convolved(1, 256, 1024, 14, dtype=torch.float64)
    assert not is_convolved(2, 256, 1024, 14, turn=True)
    compiled = torch.compile(is_convolved, backend='eager', fullgraph=True)
    assert not compiled(1, 256, 1024, 14)


@pytest.mark.parametrize('padding', ['same', 'valid'])
@pytest.mark.parametrize('bounds', BOUNDS)
@pytest.mark.parametrize('batch', [0, 1, 3])
def test_padding_by_name(padding, bounds, batch, monkeypatch):
    torch.manual_seed(0)
    for name, value in BOUNDS[bounds].items():
        monkeypatch.setattr(convolution, name, value)
    for kernel_size, groups in (((3, 2), 1), ((1, 1), 1), ((1, 3), 3)):
        check(ops.dynamic_conv, reference.dynamic_conv,
              (leaf(batch, 6, 5, 6), leaf(batch, 3, 6 // groups, *kernel_size), leaf(3)),
              (1, 1), padding, (1, 2), groups)


def test_the_bounds_choose_different_paths(monkeypatch):
    # Otherwise the tests above might all test the same path.
    x, kernel = torch.randn(2, 4, 6, 6), torch.randn(2, 4, 4, 3, 3, requires_grad=True)
    geometry = (1, 1), (1, 1), (1, 1), 1
    chosen = set()
    for bounds in BOUNDS.values():
        for name, value in bounds.items():
            monkeypatch.setattr(convolution, name, value)
        chosen.add(convolution.choose_path(x, kernel, *geometry))
        # Without gradients the grouped convolution is not used.
        assert convolution.choose_path(x, kernel.detach(), *geometry) is not paths.grouped
    chosen.add(convolution.choose_path(x[:1], kernel[:1], *geometry))
    chosen.add(convolution.choose_path(x[:0], kernel[:0], *geometry))
    chosen.add(convolution.choose_path(x, kernel[..., :1, :1], (1, 1), (0, 0), (1, 1), 1))
    assert len(chosen) == 6


@settings(deadline=None, max_examples=30)
@given(g=geometries(), reordered=st.booleans())
def test_one_sample(g, reordered):
    assume(g['groups'] == 1)
    torch.manual_seed(0)
    x = leaf(1, g['cell_shape'][1], *g['size'])
    kernel = leaf(1, 3, g['cell_shape'][1], *g['kernel_size'])
    for positions in (0, 10**9):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convolution, 'IM2COL_POSITIONS', positions)
            check(ops.dynamic_conv, reference.dynamic_conv,
                  (x, position_major(kernel) if reordered else kernel, leaf(3)), g['stride'],
                  g['padding'], g['dilation'], 1)
