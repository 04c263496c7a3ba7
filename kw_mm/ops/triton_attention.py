"""The attention's small layers in Triton: hidden units, and the way from them to mixing weights.

Compiled for GPUs and checked with Triton's interpreter; not run on a GPU yet.

Nothing here is much work; what it saves are launches and the logits' way to memory and back.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import EPS
from .triton_support import block, compute_dtype, dot_precision, register

BLOCK_SAMPLES = 16  # the least that tl.dot takes

# A layer norm's units are one tile: more would not fit into shared memory. The paper's largest
# network with layer norm has 192.
MAX_NORMED_UNITS = 256


@triton.jit
def _linear(input_ptr, weight_ptr, bias_ptr, samples, units, num_samples, unit_valid, width,
            dtype: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
            BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr):
    """input[samples] @ weight[units].T + bias[units], 0 for units that are not valid."""
    total = tl.zeros((BLOCK_N, BLOCK_U), ACC)
    for first in range(0, width, BLOCK_K):
        terms = first + tl.arange(0, BLOCK_K)
        values = tl.load(input_ptr + samples[:, None] * width + terms[None, :],
                         mask=(samples < num_samples)[:, None] & (terms < width)[None, :], other=0)
        weights = tl.load(weight_ptr + units.to(tl.int64)[None, :] * width + terms[:, None],
                          mask=unit_valid[None, :] & (terms < width)[:, None], other=0)
        total = tl.dot(values.to(dtype), weights.to(dtype), total, input_precision=PRECISION,
                       out_dtype=ACC)
    return total + tl.load(bias_ptr + units, mask=unit_valid, other=0).to(ACC)[None, :]


@triton.jit(do_not_specialize=['num_samples'])
def _hidden_kernel(pooled_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, hidden_ptr,
                   num_samples, width, num_hidden, EPS: tl.constexpr, LAYER_NORM: tl.constexpr,
                   ACC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
                   BLOCK_U: tl.constexpr, BLOCK_K: tl.constexpr):
    """Grid: blocks of hidden units (one for all of them with layer norm), blocks of samples."""
    dtype = hidden_ptr.dtype.element_ty
    units = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    samples = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = units < num_hidden
    z = _linear(pooled_ptr, weight_ptr, bias_ptr, samples, units, num_samples, valid, width, dtype,
                ACC, PRECISION, BLOCK_N, BLOCK_U, BLOCK_K)
    if LAYER_NORM:
        z -= tl.sum(z, 1)[:, None] / num_hidden
        z = tl.where(valid[None, :], z, 0)
        variance = tl.sum(z * z, 1) / num_hidden
        # tl.full, as below, for a bare number would count as float32.
        z /= tl.sqrt(variance + tl.full((BLOCK_N,), EPS, ACC))[:, None]
        z = (z * tl.load(norm_weight_ptr + units, mask=valid, other=0).to(ACC)[None, :]
             + tl.load(norm_bias_ptr + units, mask=valid, other=0).to(ACC)[None, :])
    # Not tl.maximum, which drops NaN.
    tl.store(hidden_ptr + samples[:, None] * num_hidden + units[None, :],
             tl.where(z < 0, 0, z).to(dtype),
             mask=(samples < num_samples)[:, None] & valid[None, :])


@triton.jit(do_not_specialize=['num_samples', 'num_mixtures'])
def _mix_kernel(hidden_ptr, weight_ptr, bias_ptr, beta_ptr, tau_ptr, alpha_ptr, num_samples,
                num_mixtures, num_cells, width, EPS: tl.constexpr, ACC: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
                BLOCK_K: tl.constexpr):
    """Grid: mixtures, blocks of samples.

    Once over the n + 1 logits for the sum of magnitudes and once more for the result: the
    weights are read again, from the cache, and the logits need no memory.
    """
    dtype = alpha_ptr.dtype.element_ty
    mixture = tl.program_id(0)
    samples = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.full((BLOCK_N,), EPS, ACC)
    for first in range(0, num_cells + 1, BLOCK_U):
        columns = first + tl.arange(0, BLOCK_U)
        z = _linear(hidden_ptr, weight_ptr, bias_ptr, samples,
                    mixture * (num_cells + 1) + columns, num_samples, columns <= num_cells, width,
                    dtype, ACC, PRECISION, BLOCK_N, BLOCK_U, BLOCK_K)
        total += tl.sum(tl.abs(z), 1)
    tau = tl.load(tau_ptr).to(ACC)
    scale = (tl.full((BLOCK_N,), 1, ACC) - tau) / total
    places = (samples.to(tl.int64) * num_mixtures + mixture) * num_cells
    for first in range(0, num_cells, BLOCK_U):
        columns = first + tl.arange(0, BLOCK_U)
        z = _linear(hidden_ptr, weight_ptr, bias_ptr, samples,
                    mixture * (num_cells + 1) + columns, num_samples, columns <= num_cells, width,
                    dtype, ACC, PRECISION, BLOCK_N, BLOCK_U, BLOCK_K)
        beta = tl.load(beta_ptr + mixture * num_cells + columns, mask=columns < num_cells,
                       other=0).to(ACC)
        tl.store(alpha_ptr + places[:, None] + columns[None, :],
                 (z * scale[:, None] + (tau * beta)[None, :]).to(dtype),
                 mask=(samples < num_samples)[:, None] & (columns < num_cells)[None, :])


@triton.jit(do_not_specialize=['num_samples', 'num_mixtures'])
def _mix_grad_kernel(grad_ptr, hidden_ptr, weight_ptr, bias_ptr, tau_ptr, logits_ptr, num_samples,
                     num_mixtures, num_cells, width, EPS: tl.constexpr, ACC: tl.constexpr,
                     PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
                     BLOCK_K: tl.constexpr):
    """With total = sum|z| + EPS, writes the gradient of the logits,

        (1 - tau) / total * (grad_p - sign(z_p) * sum_j(grad_j z_j) / total),

    where grad is 0 for the zero cell. Grid and passes as above.
    """
    dtype = logits_ptr.dtype.element_ty
    mixture = tl.program_id(0)
    samples = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = (samples.to(tl.int64) * num_mixtures + mixture) * num_cells
    total = tl.full((BLOCK_N,), EPS, ACC)
    product = tl.zeros((BLOCK_N,), ACC)
    for first in range(0, num_cells + 1, BLOCK_U):
        columns = first + tl.arange(0, BLOCK_U)
        z = _linear(hidden_ptr, weight_ptr, bias_ptr, samples,
                    mixture * (num_cells + 1) + columns, num_samples, columns <= num_cells, width,
                    dtype, ACC, PRECISION, BLOCK_N, BLOCK_U, BLOCK_K)
        grad = tl.load(grad_ptr + places[:, None] + columns[None, :],
                       mask=(samples < num_samples)[:, None] & (columns < num_cells)[None, :],
                       other=0).to(ACC)
        total += tl.sum(tl.abs(z), 1)
        product += tl.sum(grad * z, 1)
    scale = (tl.full((BLOCK_N,), 1, ACC) - tl.load(tau_ptr).to(ACC)) / total
    pull = product / total
    for first in range(0, num_cells + 1, BLOCK_U):
        columns = first + tl.arange(0, BLOCK_U)
        z = _linear(hidden_ptr, weight_ptr, bias_ptr, samples,
                    mixture * (num_cells + 1) + columns, num_samples, columns <= num_cells, width,
                    dtype, ACC, PRECISION, BLOCK_N, BLOCK_U, BLOCK_K)
        grad = tl.load(grad_ptr + places[:, None] + columns[None, :],
                       mask=(samples < num_samples)[:, None] & (columns < num_cells)[None, :],
                       other=0).to(ACC)
        sign = (z > 0).to(ACC) - (z < 0).to(ACC)
        tl.store(logits_ptr + (places + samples * num_mixtures + mixture)[:, None]
                 + columns[None, :],
                 ((grad - sign * pull[:, None]) * scale[:, None]).to(dtype),
                 mask=(samples < num_samples)[:, None] & (columns <= num_cells)[None, :])


def _options(dtype: torch.dtype, units: int, width: int) -> dict:
    """The kernels' constant arguments, and how to launch them."""
    wide = dtype == torch.float64
    return dict(ACC=tl.float64 if wide else tl.float32, PRECISION=dot_precision(dtype),
                BLOCK_N=BLOCK_SAMPLES, BLOCK_U=units, BLOCK_K=block(width, 16, 16 if wide else 32),
                num_warps=4, num_stages=2)


def _hidden_units(pooled: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None,
                  norm_bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    num_samples, num_hidden = len(pooled), len(weight)
    hidden = torch.empty(num_samples, num_hidden, dtype=dtype, device=pooled.device)
    if hidden.numel() == 0:
        return hidden
    is_normed = norm_weight is not None
    if is_normed:
        norm_weight, norm_bias = norm_weight.contiguous(), norm_bias.contiguous()
    width = pooled.shape[1]
    units = block(num_hidden, 16, MAX_NORMED_UNITS) if is_normed else 16
    with torch.cuda.device_of(pooled):
        _hidden_kernel[triton.cdiv(num_hidden, units), triton.cdiv(num_samples, BLOCK_SAMPLES)](
            pooled.contiguous(), weight.contiguous(), bias.contiguous(), norm_weight, norm_bias,
            hidden, num_samples, width, num_hidden, EPS=eps, LAYER_NORM=is_normed,
            **_options(dtype, units, width))
    return hidden


def _mix_launch(dtype: torch.dtype, num_samples: int, beta_shape: Sequence[int],
                width: int) -> tuple[tuple[int, ...], tuple[int, ...], dict]:
    """The grid, the integer arguments and the options that both of mix's kernels take."""
    num_mixtures, num_cells = beta_shape
    options = _options(dtype, block(num_cells + 1, 16, 32 if dtype == torch.float64 else 128),
                       width)
    return ((num_mixtures, triton.cdiv(num_samples, BLOCK_SAMPLES)),
            (num_samples, num_mixtures, num_cells, width), dict(options, EPS=EPS))


def _mix(hidden: Tensor, weight: Tensor, bias: Tensor, beta: Tensor, tau: Tensor,
         dtype: torch.dtype) -> Tensor:
    alpha = torch.empty(len(hidden), *beta.shape, dtype=dtype, device=hidden.device)
    if alpha.numel() == 0:
        return alpha
    grid, sizes, options = _mix_launch(dtype, len(hidden), beta.shape, hidden.shape[1])
    with torch.cuda.device_of(hidden):
        _mix_kernel[grid](hidden.contiguous(), weight.contiguous(), bias.contiguous(),
                          beta.contiguous(), tau, alpha, *sizes, **options)
    return alpha


def _mix_grad_logits(grad: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor,
                     tau: Tensor) -> Tensor:
    num_samples, *beta_shape = grad.shape
    logits = torch.empty(num_samples, len(weight), dtype=grad.dtype, device=grad.device)
    if logits.numel() == 0:
        return logits
    grid, sizes, options = _mix_launch(grad.dtype, num_samples, beta_shape, hidden.shape[1])
    with torch.cuda.device_of(grad):
        _mix_grad_kernel[grid](grad.contiguous(), hidden.contiguous(), weight.contiguous(),
                               bias.contiguous(), tau, logits, *sizes, **options)
    return logits


register('hidden_units(Tensor pooled, Tensor weight, Tensor bias, Tensor? norm_weight, '
         'Tensor? norm_bias, float eps, ScalarType dtype) -> Tensor', _hidden_units,
         lambda pooled, weight, bias, norm_weight, norm_bias, eps, dtype:
         pooled.new_empty(len(pooled), len(weight), dtype=dtype))
register('mix(Tensor hidden, Tensor weight, Tensor bias, Tensor beta, Tensor tau, '
         'ScalarType dtype) -> Tensor', _mix,
         lambda hidden, weight, bias, beta, tau, dtype:
         hidden.new_empty(len(hidden), *beta.shape, dtype=dtype))
register('mix_grad_logits(Tensor grad, Tensor hidden, Tensor weight, Tensor bias, Tensor tau) '
         '-> Tensor', _mix_grad_logits,
         lambda grad, hidden, weight, bias, tau: grad.new_empty(len(grad), len(weight)))


class _Mix(torch.autograd.Function):
    """Keeps what went in; the logits are computed again."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, beta, tau, dtype):
        ctx.save_for_backward(hidden, weight, bias, tau)
        return torch.ops.kw_mm.mix(hidden, weight, bias, beta, tau, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, bias, tau = ctx.saved_tensors
        logits = torch.ops.kw_mm.mix_grad_logits(grad, hidden, weight, bias, tau)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_hidden = (logits @ weight.to(logits.dtype)).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            grad_weight = (logits.t() @ hidden.to(logits.dtype)).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = logits.sum(0, dtype=bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None


def hidden_units(pooled: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor | None = None,
                 norm_bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """``relu(norm(pooled @ weight.T + bias))``, for inference (method, section 3).

    Batch norm is to be folded into ``weight`` and ``bias``; layer norm is computed here. Sums and
    statistics are in float32 (float64 for float64), the result in the inputs' dtype, or
    autocast's. In torch: ``relu(layer_norm(linear(pooled, weight, bias), ...))``.

    Args:
        pooled: ``(N, C)``; N may be 0.
        weight: ``(hidden, C)``.
        bias: ``(hidden,)``.
        norm_weight: Of a layer norm, ``(hidden,)``, or None for no norm.
        norm_bias: With it, ``(hidden,)``.
        eps: Of the layer norm.

    Returns:
        ``(N, hidden)``.

    Raises:
        ValueError: If a gradient would be needed, for there is none; if only one of the norm's
            two parameters is given, or both for more than ``MAX_NORMED_UNITS`` hidden units; if
            dtypes of the first three differ without autocast.
    """
    tensors = dict(pooled=pooled, weight=weight, bias=bias)
    if (norm_weight is None) != (norm_bias is None):
        raise ValueError('norm_weight and norm_bias must both be tensors or both be None')
    if norm_weight is not None:
        if len(weight) > MAX_NORMED_UNITS:
            raise ValueError(f'weight must have at most {MAX_NORMED_UNITS} rows with a layer norm, '
                             f'got {len(weight)}')
        tensors.update(norm_weight=norm_weight, norm_bias=norm_bias)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors.values()):
        raise ValueError(f'{", ".join(tensors)} must not require gradients, or hidden_units must '
                         'be called under torch.no_grad(): it has none')
    # Norm parameters are read as they are, whatever their dtype.
    dtype = compute_dtype(pooled=pooled, weight=weight, bias=bias)
    return torch.ops.kw_mm.hidden_units(pooled, weight, bias, norm_weight, norm_bias, eps, dtype)


def mix(hidden: Tensor, weight: Tensor, bias: Tensor, beta: Tensor, tau: Tensor) -> Tensor:
    """From hidden units to mixing weights in one kernel (method, section 3).

    In torch: ``mixing_weights(linear(hidden, weight, bias).unflatten(1, (m, n + 1)), beta, tau)``.
    Sums and the L1 norm are in float32 (float64 for float64), of logits that are not rounded
    before; the result is in the inputs' dtype, or autocast's. tau is read on the device.

    Args:
        hidden: ``(N, hidden)``; N may be 0.
        weight: Of fc2, ``(m * (n + 1), hidden)``.
        bias: Of fc2, ``(m * (n + 1),)``.
        beta: The initial assignment, ``(m, n)``; gets no gradient.
        tau: Temperature in [0, 1], 0-dimensional; gets no gradient.

    Returns:
        alpha, ``(N, m, n)``.

    Raises:
        ValueError: If beta or tau require a gradient, or the dtypes of ``hidden``, ``weight``
            and ``bias`` differ without autocast.
    """
    if beta.requires_grad or tau.requires_grad:
        raise ValueError('beta and tau must not require gradients, for mix has none for them')
    dtype = compute_dtype(hidden=hidden, weight=weight, bias=bias)
    return _Mix.apply(hidden, weight, bias, beta, tau, dtype)
