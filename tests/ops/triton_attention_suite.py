"""Run by test_triton.py: the attention's kernels in Triton equal torch and the reference."""
import pytest
import torch
import torch.nn.functional as F
from triton_checks import DEVICE, check, check_precision, gradients, leaf, poison  # noqa: F401

from kw_mm import ops
from kw_mm.ops import reference, triton_attention
from kw_mm.ops.triton_attention import hidden_units, mix

# N, hidden, m, n
CASES = {
    'odd': (3, 19, 2, 5),
    'many samples, units, and cells': (17, 37, 2, 40),
    'one of everything': (1, 1, 1, 1),
    'no sample': (0, 16, 2, 3),
    'cells and the zero cell fill a block': (2, 16, 3, 31),
    'the zero cell has a block of its own': (2, 16, 1, 32),
}


def inputs(case, dtype=torch.float64, tau=.37):
    torch.manual_seed(0)
    num_samples, hidden, m, n = CASES[case]
    leaves = (leaf(num_samples, hidden, dtype=dtype), leaf(m * (n + 1), hidden, dtype=dtype),
              leaf(m * (n + 1), dtype=dtype))
    return leaves, (torch.eye(m, n, dtype=dtype, device=DEVICE),
                    torch.tensor(tau, dtype=torch.float64, device=DEVICE))


def torch_mix(mixing_weights, buffers):
    def call(hidden, weight, bias):
        beta, tau = buffers
        logits = F.linear(hidden, weight, bias).unflatten(1, (beta.shape[0], -1))
        return mixing_weights(logits, beta.to(logits), tau)
    return call


def triton_mix(buffers):
    return lambda *leaves: mix(*leaves, *buffers)


@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('tau', [0., .37, 1.])
def test_mix_parity(case, tau):
    leaves, buffers = inputs(case, tau=tau)
    check(triton_mix(buffers), torch_mix(reference.mixing_weights, buffers), leaves)


def test_mix_gradcheck():
    leaves, buffers = inputs('odd')
    assert torch.autograd.gradcheck(triton_mix(buffers), leaves, fast_mode=True)


def test_mix_of_no_logits():
    # Where all logits are 0 only the assignment is left, and |z| has the gradient 0 as in torch.
    (hidden, weight, bias), buffers = inputs('odd')
    leaves = [torch.zeros_like(hidden).requires_grad_(), weight,
              torch.zeros_like(bias).requires_grad_()]
    check(triton_mix(buffers), torch_mix(reference.mixing_weights, buffers), leaves)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('case', ['odd', 'many samples, units, and cells'])
def test_mix_precision(case, dtype):
    leaves, buffers = inputs(case, dtype)
    check_precision(triton_mix(buffers), torch_mix(ops.mixing_weights, buffers), leaves)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mix_sums_that_half_precision_cannot_hold(dtype):
    # 129 logits of 1000 sum to more than float16 has; small ones vanish beside EPS in bfloat16.
    for scale in (1e3, 1e-3):
        hidden, weight = torch.ones(1, 1), scale * torch.ones(129, 1)
        hidden, weight, bias = (t.to(DEVICE, dtype) for t in (hidden, weight, torch.zeros(129)))
        buffers = torch.zeros(1, 128, device=DEVICE), torch.zeros((), device=DEVICE)
        exact = torch_mix(reference.mixing_weights, buffers)(
            hidden.double(), weight.double(), bias.double())
        torch.testing.assert_close(mix(hidden, weight, bias, *buffers).double(), exact,
                                   rtol=torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_mix_autocast_as_for_a_product(dtype):
    leaves, buffers = inputs('odd', torch.float32)

    def under_autocast(function):
        def call(*leaves):
            with torch.autocast(DEVICE, dtype):
                return function(*leaves)
        return call

    out = under_autocast(triton_mix(buffers))(*leaves)
    assert out.dtype == dtype
    assert all(g.dtype == torch.float32 for g in gradients(out, torch.ones_like(out), leaves))
    check_precision(under_autocast(triton_mix(buffers)),
                    under_autocast(torch_mix(ops.mixing_weights, buffers)), leaves)


@pytest.mark.parametrize('case', ['odd', 'the zero cell has a block of its own', 'no sample'])
def test_everything_is_written_and_nothing_else(case, poison):  # noqa: F811
    for dtype in (torch.float64, torch.bfloat16):
        leaves, buffers = inputs(case, dtype)
        out = mix(*leaves, *buffers)
        out.backward(torch.ones_like(out))
        hidden, weight, bias = (t.detach() for t in leaves)
        hidden_units(hidden, weight, bias)
        hidden_units(hidden, weight, bias, bias, bias)


def test_mix_strided_inputs():
    leaves, (beta, tau) = inputs('odd')
    strided = [t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_() for t in leaves]
    buffers = beta.t().contiguous().t(), tau
    check(triton_mix(buffers), torch_mix(reference.mixing_weights, buffers), strided)
    out = mix(*leaves, *buffers)
    one = out.new_ones(()).expand_as(out)
    for actual, wanted in zip(torch.autograd.grad(out, leaves, one, retain_graph=True),
                              torch.autograd.grad(out, leaves, one.contiguous())):
        torch.testing.assert_close(actual, wanted)


def test_mix_refuses_gradients_that_it_has_not():
    leaves, (beta, tau) = inputs('odd')
    with pytest.raises(ValueError, match='beta and tau must not require gradients'):
        mix(*leaves, beta.requires_grad_(), tau)


@pytest.mark.parametrize('dynamic', [False, True])
def test_mix_compiled_without_a_graph_break(dynamic):
    leaves, buffers = inputs('odd')
    torch._dynamo.reset()
    compiled = torch.compile(lambda hidden, weight, bias: mix(2 * hidden, weight, bias, *buffers),
                             backend='aot_eager', fullgraph=True, dynamic=dynamic)
    twin = torch_mix(reference.mixing_weights, buffers)
    check(compiled, lambda hidden, weight, bias: twin(2 * hidden, weight, bias), leaves)


def test_operators_are_described_truly():
    leaves, (beta, tau) = inputs('odd')
    hidden, weight, bias = leaves = [t.detach() for t in leaves]
    tests = ('test_schema', 'test_faketensor')
    kw_mm = torch.ops.kw_mm
    torch.library.opcheck(kw_mm.mix, (*leaves, beta, tau, torch.float32), test_utils=tests)
    torch.library.opcheck(kw_mm.mix_grad_logits, (hidden.new_ones(3, 2, 5), *leaves, tau),
                          test_utils=tests)
    torch.library.opcheck(kw_mm.hidden_units, (*leaves, bias, bias, 1e-5, torch.float32),
                          test_utils=tests)


# N, C, hidden
HIDDEN_CASES = {
    'odd': (3, 19, 5),
    'many samples, channels, and units': (17, 70, 37),
    'one of everything': (1, 1, 1),
    'no sample': (0, 4, 4),
    'as many as there can be': (1, 5, triton_attention.MAX_NORMED_UNITS),
}


def hidden_inputs(case, dtype):
    torch.manual_seed(0)
    num_samples, channels, hidden = HIDDEN_CASES[case]
    shapes = ((num_samples, channels), (hidden, channels), (hidden,), (hidden,), (hidden,))
    return [torch.randn(shape, dtype=dtype, device=DEVICE) for shape in shapes]


def torch_hidden_units(pooled, weight, bias, *norm):
    z = F.linear(pooled, weight, bias)
    return F.relu(F.layer_norm(z, z.shape[1:], *norm) if norm else z)


@pytest.mark.parametrize('norm', [False, True])
@pytest.mark.parametrize('case', HIDDEN_CASES)
def test_hidden_units(case, norm):
    tensors = hidden_inputs(case, torch.float64)[:5 if norm else 3]
    torch.testing.assert_close(hidden_units(*tensors), torch_hidden_units(*tensors), rtol=1e-12,
                               atol=1e-12)
    strided = [t.repeat_interleave(2, -1)[..., ::2] for t in tensors]
    assert torch.equal(hidden_units(*strided), hidden_units(*tensors))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        tensors = hidden_inputs(case, dtype)[:5 if norm else 3]
        exact = torch_hidden_units(*(t.double() for t in tensors))
        ours, torchs = ((f(*tensors).double() - exact).abs().sum()
                        for f in (hidden_units, torch_hidden_units))
        assert ours <= 2 * torchs


def test_hidden_units_pass_nan_on():
    # The maximum of NaN and 0 is 0 to Triton.
    pooled, weight, bias, *_ = hidden_inputs('odd', torch.float32)
    pooled[1, 2] = torch.nan
    assert torch.equal(hidden_units(pooled, weight, bias).isnan(),
                       torch_hidden_units(pooled, weight, bias).isnan())


def test_hidden_units_compiled_and_under_autocast():
    tensors = hidden_inputs('odd', torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(hidden_units, backend='aot_eager', fullgraph=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        out = compiled(*tensors)
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, hidden_units(*tensors))


def test_hidden_units_refuse():
    pooled, weight, bias, norm_weight, norm_bias = hidden_inputs('odd', torch.float32)
    with pytest.raises(ValueError, match='both be tensors or both be None'):
        hidden_units(pooled, weight, bias, norm_weight)
    with pytest.raises(ValueError, match='must not require gradients'):
        hidden_units(pooled, weight, bias, norm_weight, norm_bias.requires_grad_())
    with torch.no_grad():
        hidden_units(pooled, weight, bias, norm_weight, norm_bias)
    many = torch.zeros(triton_attention.MAX_NORMED_UNITS + 1)
    with pytest.raises(ValueError, match='at most 256 rows with a layer norm, got 257'):
        hidden_units(pooled, many[:, None].expand(-1, 19), many, many, many)
    with pytest.raises(ValueError, match='must have one floating-point dtype'):
        hidden_units(pooled, weight.double(), bias)
