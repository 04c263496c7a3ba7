"""Contrasting-driven attention: from logits to mixing weights."""
from __future__ import annotations

import math

import torch
from torch import Tensor

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


def mixing_weights(logits: Tensor, beta: Tensor, tau: Tensor) -> Tensor:
    """L1-normalises logits and pulls them towards the assignment; see ``reference``."""
    alpha = logits[..., :-1] / logit_norms(logits).unsqueeze(-1)
    return torch.lerp(alpha, beta.to(alpha.dtype), tau.to(alpha.dtype)).to(logits.dtype)


def logit_norms(logits: Tensor) -> Tensor:
    """What logits ``(N, m, n + 1)`` are divided by; see ``reference``. Not in half precision."""
    # In float16 a sum of magnitudes overflows; in bfloat16 EPS is lost beside it.
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return z.abs().sum(-1) + EPS


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
