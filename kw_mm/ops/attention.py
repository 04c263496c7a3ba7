"""Contrasting-driven attention: from logits to mixing weights."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import dispatch
from .reference import EPS


def mean_positions(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Averages ``(N, C, *spatial)`` over positions; see ``reference``."""
    positions = tuple(range(2, x.dim()))
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.mean(positions, dtype=dtype)
    # The gradient of a sum is a view; that of torch's mean is a tensor as large as the input. In
    # float16 a sum would overflow.
    half = x.dtype in (torch.float16, torch.bfloat16)
    total = x.sum(positions, dtype=torch.float32 if half else None)
    return (total / math.prod(x.shape[2:])).to(dtype or x.dtype)


def hidden_units(pooled: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``relu(pooled @ weight.T + bias)``, ``(N, C)`` to ``(N, hidden)``."""
    # A GPU's library applies a ReLU while it multiplies. Recorders do not know that function.
    if (bias is None or pooled.device.type not in ('cuda', 'meta') or torch.is_grad_enabled()
            or torch.jit.is_tracing()):
        return F.relu(F.linear(pooled, weight, bias))
    return torch._addmm_activation(bias, pooled, weight.T)


def mixing_weights(logits: Tensor, beta: Tensor | None, tau: Tensor | None) -> Tensor:
    """L1-normalises logits and pulls them towards the assignment; see ``reference``.

    Without beta and tau the temperature is 0.
    """
    alpha = logits[..., :-1] / logit_norms(logits).unsqueeze(-1)
    if beta is not None and tau is not None:
        alpha = torch.lerp(alpha, beta.to(alpha.dtype), tau.to(alpha.dtype))
    return alpha.to(logits.dtype)


def logit_norms(logits: Tensor) -> Tensor:
    """What logits ``(N, m, n + 1)`` are divided by; see ``reference``. Not in half precision."""
    # In float16 a sum of magnitudes overflows; in bfloat16 EPS is lost beside it.
    half = logits.dtype in (torch.float16, torch.bfloat16)
    if dispatch.is_recorded():
        return (logits.float() if half else logits).abs().sum(-1) + EPS
    # One kernel where these are two or three. Other formats have more names for those.
    return torch.linalg.vector_norm(
        logits, 1, -1, dtype=torch.float32 if half else None) + EPS


def mixing_weights_grad(grad: Tensor, logits: Tensor, tau: Tensor | None) -> Tensor:
    """The gradient of logits from that of mixing weights.

    With s the norm of a row, ``alpha_j = (1 - tau) z_j / s + tau beta_j`` and ``ds/dz_p =
    sign(z_p)`` give ``dz_p = g_p - sign(z_p) sum_j g_j z_j / s`` with ``g = (1 - tau) grad / s``,
    which is 0 for the zero cell.
    """
    norms = logit_norms(logits).unsqueeze(-1)
    grad = grad.to(norms.dtype) / norms
    if tau is not None:
        grad = grad * (1 - tau.to(grad.dtype))
    z = logits.to(norms.dtype)
    shares = (grad * z[..., :-1]).sum(-1, keepdim=True) / norms
    return (F.pad(grad, (0, 1)) - z.sign() * shares).to(logits.dtype)


def order_logits(own: Tensor, others: Tensor, zero: Tensor, bias: Tensor,
                 first_cell: int) -> Tensor:
    """Logits in the order of cells, with their bias: what ``reference.basis_logits`` ends with.

    Args:
        own: Of the layer's own cells, ``(N, m, local)``.
        others: Of the cells of other layers, ``(N, m, nonlocal)``.
        zero: Of the zero cell, ``(N, m, 1)``.
        bias: ``(m * (n + 1),)`` with n = local + nonlocal.
        first_cell: Index of the layer's first own cell.

    Returns:
        z, ``(N, m, n + 1)``.
    """
    before, after = others.split((first_cell, others.shape[-1] - first_cell), dim=-1)
    logits = torch.cat((before, own, after, zero), dim=-1)
    return logits + bias.view(logits.shape[1:])
