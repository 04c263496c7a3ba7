"""The operators as the dispatcher knows them: shapes and strides, gradients of every order,
compilers, tracers, transforms, modes and counters."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from needs import needs_halves, needs_operators
from parity import check, geometries
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kw_mm import ops
from kw_mm.ops import operators, reference
from kw_mm.ops.layout import cut_kernel

# Grid, kernel size, shape of the cells: positions are in the grid, in the cells, or absent.
SIZES = {
    'spatial': ((9, 2, 1), (3, 3), (3, 2, 4, 1, 1)),
    'whole': ((1, 1, 2), (3, 3), (3, 2, 4, 3, 3)),
    'pointwise': ((1, 2, 2), (1, 1), (3, 2, 4, 1, 1)),
    'depthwise': ((4, 2, 1), (2, 2), (3, 4, 1, 1, 1)),
    '1-d': ((3, 1, 2), (3,), (3, 2, 4, 1)),
    '3-d': ((2, 2, 1), (1, 2, 1), (3, 2, 4, 1, 1, 1)),
    'large': ((9, 1, 1), (3, 3), (33, 4, 16, 1, 1)),
}


def inputs(case, dtype=torch.float64, batch=2, scaled=False):
    torch.manual_seed(0)
    grid, kernel_size, shape = SIZES[case]
    tensors = [torch.randn(batch, math.prod(grid), shape[0], dtype=dtype),
               torch.randn(shape, dtype=dtype)]
    if scaled:
        tensors.append(torch.randn(grid[1] * shape[1], dtype=dtype))
    return [t.requires_grad_() for t in tensors], (grid, kernel_size)


def bases_inputs(dtype=torch.float64):
    torch.manual_seed(0)
    tensors = [torch.rand(2, 3, dtype=dtype), torch.randn(2, 3, 6, dtype=dtype),
               torch.randn(6, 4, 5, dtype=dtype)]
    return [t.requires_grad_() for t in tensors], (3, 1, 1), (2, 5, 3)


@needs_operators
@pytest.mark.parametrize('dtype', [torch.float32,
                                   pytest.param(torch.float64, marks=pytest.mark.slow)])
@pytest.mark.parametrize('case', SIZES)
def test_the_dispatcher_s_own_checks(case, dtype):
    # Tests of the schema, shapes and strides of fakes, autograd, and compilation with static and
    # dynamic sizes.
    (alpha, cells), sizes = inputs(case, dtype)
    pieces = cut_kernel(ops.assemble_kernel(alpha, cells, *sizes).detach(), sizes[0],
                        cells.shape[1:]).requires_grad_()
    for operator, arguments in (
            (torch.ops.kw_mm.assemble, (alpha, cells, *sizes, None, dtype)),
            (torch.ops.kw_mm.assemble_grad_alpha, (pieces, cells)),
            (torch.ops.kw_mm.assemble_grad_cells, (pieces, alpha))):
        torch.library.opcheck(operator.default, arguments)


@needs_operators
def test_the_dispatcher_s_own_checks_of_bases():
    tensors, grid, shape = bases_inputs()
    torch.library.opcheck(torch.ops.kw_mm.mix_bases.default,
                          (*tensors, grid, shape, torch.float64))


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('tau', [None, 0.3])
@pytest.mark.parametrize('case', ['spatial', 'whole'])
def test_logits_in_one_operator(case, tau, scaled):
    tensors, sizes = inputs(case, batch=1, scaled=scaled)
    alpha, cells = (t.detach() for t in tensors[:2])
    logits = torch.randn(*alpha.shape[:2], alpha.shape[2] + 1).double().requires_grad_()
    scale = tensors[2].detach() if scaled else None
    beta = None if tau is None else torch.rand(alpha.shape[1:]).double()
    tau = tau if tau is None else torch.tensor(tau).double()
    arguments = logits, beta, tau, cells[..., :2, :, :].requires_grad_(), *sizes, scale
    zeros = (torch.zeros_like(alpha[0]), torch.zeros(()).double()) if beta is None else (beta, tau)

    def kernel(logits, cells, scale=None):
        return ops.assemble_logits(logits, beta, tau, cells, *sizes, scale)

    def literal(logits, cells, scale=None):
        alpha = reference.mixing_weights(logits, *zeros)
        found = reference.assemble_kernel(alpha, cells, *sizes)
        return found if scale is None else found * scale.view(-1, 1, 1, 1)

    leaves = [arguments[0], arguments[3], *([scale.requires_grad_()] if scaled else [])]
    check(kernel, literal, leaves)
    assert torch.autograd.gradcheck(kernel, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(kernel, leaves, fast_mode=True)
    if operators.ARE_REGISTERED:
        torch.library.opcheck(torch.ops.kw_mm.assemble_logits.default,
                              (*arguments, torch.float64))


@pytest.mark.parametrize('scaled', [False, True])
@pytest.mark.parametrize('case', SIZES)
def test_gradients_of_two_orders(case, scaled):
    tensors, sizes = inputs(case, batch=1, scaled=scaled)
    if case == 'large':
        tensors = [t.detach()[..., :2].requires_grad_() if t.dim() == 3 else t for t in tensors]
        tensors[1] = tensors[1].detach()[:2, :, :3].requires_grad_()

    def kernel(alpha, cells, scale=None):
        return ops.assemble_kernel(alpha, cells, *sizes, scale)

    assert torch.autograd.gradcheck(kernel, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(kernel, tensors, fast_mode=True)


def test_gradients_of_two_orders_of_bases():
    tensors, grid, shape = bases_inputs()

    def kernel(*tensors):
        return operators.mix_bases(*tensors, grid, shape, tensors[0].dtype)

    assert torch.autograd.gradcheck(kernel, tensors)
    assert torch.autograd.gradgradcheck(kernel, tensors)


@settings(deadline=None, max_examples=100)
@given(g=geometries(), scaled=st.booleans(), dtype=st.sampled_from([torch.float32, torch.float64]),
       compiled=st.booleans())
def test_kernels_lie_in_memory_as_compilers_expect(g, scaled, dtype, compiled):
    alpha = torch.randn(g['batch'], math.prod(g['grid']), g['num_cells'], dtype=dtype)
    cells = torch.randn(g['num_cells'], 16, *g['cell_shape'][1:], dtype=dtype)
    scale = torch.randn(16 * g['grid'][1], dtype=dtype) if scaled else None
    ops.use_cpu_products(compiled)
    try:
        kernel = ops.assemble_kernel(alpha, cells, g['grid'], g['kernel_size'], scale)
    finally:
        ops.use_cpu_products()
    with FakeTensorMode() as mode:
        alpha, cells, scale = (t if t is None else mode.from_tensor(t)
                               for t in (alpha, cells, scale))
        fake = ops.assemble_kernel(alpha, cells, g['grid'], g['kernel_size'], scale)
    assert kernel.shape == fake.shape and kernel.dtype == fake.dtype
    assert kernel.stride() == fake.stride()


@needs_halves
@pytest.mark.parametrize('dtype', [torch.float16, torch.float32])
def test_both_dtypes_of_a_mixed_product(dtype):
    # With cells in half precision, mixing weights and their gradients stay single, because these
    # sums exceed the range of half precision.
    alpha = torch.rand(1, 2, 6, requires_grad=True)
    cells = torch.rand(6, 32, 64, 1, 1, dtype=dtype).half().to(dtype).requires_grad_()
    kernel = ops.assemble_kernel(alpha, cells, (1, 2, 1), (1, 1), dtype=torch.float16)
    assert kernel.dtype == torch.float16
    grads = torch.autograd.grad(kernel, (alpha, cells), torch.full_like(kernel, 100))
    assert grads[0].dtype == torch.float32 and grads[1].dtype == dtype
    torch.testing.assert_close(grads[0], 100 * cells.float().flatten(1).sum(1).expand(1, 2, -1))
    assert grads[0].max() > torch.finfo(torch.float16).max


def test_factors_of_another_dtype():
    # A norm's factors stay single under autocast. Kernels then became single too, which compilers
    # did not expect, and their gradients did not match half cells.
    (alpha, cells, scale), sizes = inputs('spatial', torch.float32, scaled=True)
    half = cells.detach().bfloat16().requires_grad_()
    kernel = ops.assemble_kernel(alpha, half, *sizes, scale)
    assert kernel.dtype == torch.bfloat16
    torch.testing.assert_close(kernel.float(), ops.assemble_kernel(alpha, cells, *sizes, scale),
                               rtol=0.05, atol=0.05)
    grads = torch.autograd.grad(kernel.sum(), (alpha, half, scale))
    wanted = torch.autograd.grad(ops.assemble_kernel(alpha, cells, *sizes, scale).sum(),
                                 (alpha, cells, scale))
    assert [g.dtype for g in grads] == [torch.float32, torch.bfloat16, torch.float32]
    for actual, expected in zip(grads, wanted):
        torch.testing.assert_close(actual.float(), expected, rtol=0.05, atol=0.2)


# Transforms, modes and counters.

def layer_loss(alpha, cells, case='spatial'):
    return ops.assemble_kernel(alpha, cells, *SIZES[case][:2]).sin().sum()


@pytest.mark.parametrize('dynamic', [False, True])
def test_compiled_code_calls_the_operators(dynamic):
    (alpha, cells), _ = inputs('spatial', torch.float32)
    function = torch.compile(layer_loss, backend='aot_eager', fullgraph=True, dynamic=dynamic)
    for batch in (2, 3):
        a = torch.cat([alpha, alpha])[:batch].detach().requires_grad_()
        actual = torch.autograd.grad(function(a, cells), (a, cells))
        torch.testing.assert_close(actual, torch.autograd.grad(layer_loss(a, cells), (a, cells)))


@pytest.mark.parametrize('grad', [False, True])
def test_traced(grad):
    (alpha, cells), _ = inputs('spatial', torch.float32)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(layer_loss, (alpha, cells))
        other = torch.randn(5, *alpha.shape[1:], requires_grad=grad)
        torch.testing.assert_close(traced(other, cells), layer_loss(other, cells))
    assert ('kw_mm::assemble' in str(traced.graph)) == operators.ARE_REGISTERED
    if grad:
        torch.testing.assert_close(torch.autograd.grad(traced(other, cells), (other, cells)),
                                   torch.autograd.grad(layer_loss(other, cells), (other, cells)))


def test_function_transforms():
    (alpha, cells), _ = inputs('spatial')
    expected = torch.autograd.grad(layer_loss(alpha, cells), (alpha, cells))
    torch.testing.assert_close(torch.func.grad(layer_loss, (0, 1))(alpha, cells), expected)
    torch.testing.assert_close(torch.func.vjp(layer_loss, alpha, cells)[1](
        torch.ones((), dtype=alpha.dtype)), expected)
    # One gradient for each sample, also of shared tensors.
    each = torch.func.vmap(torch.func.grad(layer_loss, (0, 1)), (0, None))(alpha[:, None], cells)
    torch.testing.assert_close(each[0].flatten(0, 1), expected[0])
    torch.testing.assert_close(each[1].sum(0), expected[1])
    hessian = torch.func.jacrev(torch.func.grad(layer_loss))(alpha[:1], cells)
    exact = torch.autograd.functional.hessian(lambda a: layer_loss(a, cells), alpha[:1])
    torch.testing.assert_close(hessian, exact)


def test_flops_are_counted():
    (alpha, cells), sizes = inputs('large', torch.float32)
    work = 2 * alpha.numel() * cells[0].numel()
    with FlopCounterMode(display=False) as counter:
        loss = ops.assemble_kernel(alpha, cells, *sizes).sum()
    assert counter.get_total_flops() == work
    with counter:
        loss.backward()
    assert counter.get_total_flops() == 2 * work
    tensors, grid, shape = bases_inputs(torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        operators.mix_bases(*tensors, grid, shape, tensors[0].dtype)
    assert counter.get_total_flops() == 2 * 2 * tensors[2].numel()


def test_the_meta_device_knows_shapes():
    (alpha, cells), sizes = inputs('spatial')
    kernel = ops.assemble_kernel(alpha.to('meta'), cells.to('meta'), *sizes)
    assert kernel.is_meta and kernel.shape == ops.assemble_kernel(alpha, cells, *sizes).shape
