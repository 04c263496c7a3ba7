"""Layers under autocast are as precise as static ones and stay within float16's range."""
import copy

import pytest
import torch
from needs import needs_float16
from torch import nn

from kw_mm import ConvSpec, KWConv1d, KWConv2d, KWLinear, plan_warehouses
from kw_mm.layers import Attention

FLOAT16 = pytest.param(torch.float16, marks=needs_float16)


def grads(module, x, weights, dtype=None):
    """Gradients of a linear form, in float64, of the parameters and the input."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast('cpu', dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        y = module(x)
    (y.to(weights.dtype) * weights).sum().backward()
    return {'x': x.grad.double(), **{n: p.grad.double() for n, p in module.named_parameters()}}


def check(module, x, weights, dtype, tolerance):
    """Compares with float64, for the same input."""
    exact = grads(copy.deepcopy(module).double(), x.to(dtype).double(), weights.double())
    for name, grad in grads(module, x.to(dtype), weights, dtype).items():
        wanted = exact[name]
        assert grad.isfinite().all(), name
        if wanted.norm() > 1e-6 * weights.norm():  # the gradient of a bias before a norm is 0
            assert (grad - wanted).norm() < tolerance * wanted.norm(), name


@pytest.mark.parametrize('dtype', [FLOAT16, torch.bfloat16])
@pytest.mark.parametrize('norm', ['BN1d', 'LN'])
@pytest.mark.parametrize('kw_cfg', [dict(), dict(nonlocal_basis_ratio=0.5)])
def test_gradients_of_the_attention(norm, dtype, kw_cfg):
    # The averages of two images hardly differ. Their small deviation, by which batch norm divides,
    # was rounded to 0, and the gradient of fc1's output overflowed float16.
    torch.manual_seed(0)
    plan = plan_warehouses([ConvSpec(name, 16, 16, (3, 3)) for name in 'ab'],
                           dict(attn_norm=norm, **kw_cfg))
    attention = Attention(plan.layers['b'])
    x = torch.rand(1, 16, 5, 5) + 0.1 * torch.randn(2, 16, 1, 1)
    # A loss scale with which torch's GradScaler begins.
    weights = 65_536. * torch.randn(2, 9, plan.layers['b'].num_cells)
    # The gradient of the input has the input's precision.
    check(attention, x, weights, dtype, 4 * torch.finfo(dtype).eps)


@needs_float16
@pytest.mark.parametrize('norm', ['BN1d', 'LN'])
@pytest.mark.parametrize('batch', [1, 2])
def test_gradients_of_mixing_weights_beyond_float16(norm, batch):
    # Each is a sum of so many products that it overflows float16, while the kernel's own gradient,
    # 2,000 to 4,000 here, does not. In float16 it made all earlier gradients infinite.
    torch.manual_seed(0)
    layer = KWConv2d(64, 64, 3, padding=1, bias=False, kw_cfg=dict(attn_norm=norm)).train()
    nn.init.uniform_(layer.warehouse_manager.weights[0], 0.05, 0.15)
    x = torch.rand(1, 64, 6, 6) + 0.2 * torch.rand(batch, 64, 1, 1)
    alpha_grads = []

    def watch(module, args, alpha):
        alpha.register_hook(alpha_grads.append)

    layer.attention.register_forward_hook(watch)
    check(layer, x, torch.full((batch, 64, 6, 6), 200.), torch.float16, 0.02)
    assert max(g.abs().max() for g in alpha_grads) > torch.finfo(torch.float16).max


@pytest.mark.parametrize('norm', ['BN1d', 'LN'])
def test_mixing_weights_keep_the_precision_of_the_parameters(norm):
    plan = plan_warehouses([ConvSpec('a', 4, 4, (3, 3))], dict(attn_norm=norm))
    x = torch.randn(3, 4, 5, 5)
    for dtype in (torch.float32, torch.float64):
        attention = Attention(plan.layers['a'], dtype=dtype).eval()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            alpha = attention(x.to(dtype))
        assert alpha.dtype == dtype
        assert torch.equal(alpha, attention(x.to(dtype)))


@pytest.mark.parametrize('layer, shape', [
    (KWConv2d(4, 6, 3, padding=1), (2, 4, 5, 5)), (KWConv2d(4, 6, 1), (2, 4, 5, 5)),
    (KWConv1d(4, 6, 3), (2, 4, 6)), (KWLinear(4, 6), (2, 5, 4))])
@pytest.mark.parametrize('dtype', [FLOAT16, torch.bfloat16])
def test_autocast_leaves_float64_alone(layer, shape, dtype):
    # Static layers do this; KW layers mixed half and double precision.
    layer = copy.deepcopy(layer).double()
    x = torch.randn(shape, dtype=torch.float64)
    weights = torch.randn_like(layer(x))
    expected, actual = (grads(layer, x, weights, d) for d in (None, dtype))
    for name, grad in expected.items():
        assert torch.equal(actual[name], grad), name
