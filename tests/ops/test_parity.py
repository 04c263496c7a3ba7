"""Every fast function equals its reference: outputs and all gradients, float64, odd geometries."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import check, geometries, leaf

from kw_mm import ops
from kw_mm.ops import reference


@settings(deadline=None, max_examples=150)
@given(geometries())
def test_assembly_and_convolution(g):
    torch.manual_seed(0)
    alpha = leaf(g['batch'], math.prod(g['grid']), g['num_cells'])
    cells = leaf(g['num_cells'], *g['cell_shape'])
    check(ops.assemble_kernel, reference.assemble_kernel, (alpha, cells), g['grid'],
          g['kernel_size'])
    kernel = ops.assemble_kernel(alpha, cells, g['grid'], g['kernel_size']).detach()
    x = leaf(g['batch'], kernel.shape[2] * g['groups'], *g['size'])
    bias = leaf(kernel.shape[1]) if g['bias'] else None
    check(ops.dynamic_conv, reference.dynamic_conv, (x, kernel.requires_grad_(), bias),
          g['stride'], g['padding'], g['dilation'], g['groups'])


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(0, 5), m=st.integers(1, 4), n=st.integers(1, 5),
       tau=st.sampled_from([0., 0.37, 1.]))
def test_mixing_weights(batch, m, n, tau):
    torch.manual_seed(0)
    beta = torch.eye(m, n, dtype=torch.float64)
    check(ops.mixing_weights, reference.mixing_weights, (leaf(batch, m, n + 1),), beta,
          torch.tensor(tau, dtype=torch.float64))


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(0, 5), m=st.integers(1, 4), n=st.integers(0, 5))
def test_logit_norms(batch, m, n):
    torch.manual_seed(0)
    check(ops.logit_norms, reference.logit_norms, (leaf(batch, m, n + 1),))


@settings(deadline=None, max_examples=40)
@given(batch=st.integers(0, 3), channels=st.integers(1, 3),
       size=st.lists(st.integers(1, 4), min_size=1, max_size=3), contiguous=st.booleans())
def test_mean_positions(batch, channels, size, contiguous):
    torch.manual_seed(0)
    x = leaf(batch, channels, *size)
    if not contiguous:
        x = x.detach().transpose(1, -1).contiguous().transpose(1, -1).requires_grad_()
    check(ops.mean_positions, reference.mean_positions, (x,))


@settings(deadline=None, max_examples=60)
@given(batch=st.integers(0, 3), m=st.integers(1, 3), local=st.integers(0, 3),
       nonlocal_=st.integers(1, 5), basis=st.integers(1, 4), data=st.data())
def test_basis_logits(batch, m, local, nonlocal_, basis, data):
    torch.manual_seed(0)
    inputs = (leaf(batch, m, local + basis + 1), leaf(nonlocal_, basis),
              leaf(m * (local + nonlocal_ + 1)))

    def in_order(rows, fc3, bias, first_cell):
        own, others, zero = rows.split((local, basis, 1), dim=-1)
        return ops.order_logits(own, F.linear(others, fc3), zero, bias, first_cell)

    check(in_order, reference.basis_logits, inputs, data.draw(st.integers(0, nonlocal_)))


def test_gradcheck():
    torch.manual_seed(0)
    logits, cells, x = leaf(2, 4, 4), leaf(3, 2, 1, 1, 1), leaf(2, 2, 5, 3)
    beta = torch.eye(4, 3, dtype=torch.float64)

    def layer(logits, cells, x):
        alpha = ops.mixing_weights(logits, beta, torch.tensor(0.3, dtype=torch.float64))
        kernel = ops.assemble_kernel(alpha, cells, (2, 1, 2), (2, 1))
        return ops.dynamic_conv(x, kernel, None, (2, 1), (1, 0), (1, 1), 1)

    assert torch.autograd.gradcheck(layer, (logits, cells, x))
    assert torch.autograd.gradgradcheck(ops.mean_positions, (x,))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_normalisation_is_safe_in_half_precision(dtype):
    # 600 logits of 1000 sum to 6e5, beyond float16; small ones vanish beside EPS in bfloat16.
    for scale in (1e3, 1e-3):
        logits = scale * torch.ones(1, 1, 600, dtype=dtype)
        beta, tau = torch.zeros(1, 599, dtype=dtype), torch.zeros((), dtype=torch.float64)
        alpha = ops.mixing_weights(logits, beta, tau)
        exact = reference.mixing_weights(logits.double()[..., :600], beta.double(), tau)
        assert alpha.dtype == dtype
        torch.testing.assert_close(alpha.double(), exact, rtol=torch.finfo(dtype).eps, atol=0)
