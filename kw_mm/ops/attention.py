"""Contrasting-driven attention: from logits to mixing weights."""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import EPS


def mean_positions(x: Tensor) -> Tensor:
    """Averages ``(N, C, *spatial)`` over positions; see ``reference``."""
    if x.requires_grad and torch.is_grad_enabled():
        return _MeanPositions.apply(x)
    return x.mean(tuple(range(2, x.dim())))


class _MeanPositions(torch.autograd.Function):
    """A mean whose gradient is a view, where torch's own writes one as large as the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return x.mean(tuple(range(2, x.dim())))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad / math.prod(ctx.shape[2:])
        return grad.view(*grad.shape, *(1,) * (len(ctx.shape) - 2)).expand(ctx.shape)


def mixing_weights(logits: Tensor, beta: Tensor, tau: Tensor) -> Tensor:
    """L1-normalises logits and pulls them towards the assignment; see ``reference``."""
    alpha = logits[..., :-1] / logit_norms(logits).unsqueeze(-1)
    return ((1 - tau) * alpha + tau * beta).to(logits.dtype)


def logit_norms(logits: Tensor) -> Tensor:
    """What logits ``(N, m, n + 1)`` are divided by; see ``reference``. Not in half precision."""
    # A sum of magnitudes overflows float16 and drowns EPS in bfloat16.
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return z.abs().sum(-1) + EPS


def basis_logits(rows: Tensor, fc3: Tensor, bias: Tensor, first_cell: int) -> Tensor:
    """Logits through a non-local basis; see ``reference``."""
    num_nonlocal, num_basis = fc3.shape
    own, basis, zero = rows.split((rows.shape[-1] - num_basis - 1, num_basis, 1), dim=-1)
    before, after = F.linear(basis, fc3).split((first_cell, num_nonlocal - first_cell), dim=-1)
    logits = torch.cat((before, own, after, zero), dim=-1)
    return logits + bias.view(logits.shape[1:])
