"""Contrasting-driven attention: from logits to mixing weights."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import EPS


def mixing_weights(logits: Tensor, beta: Tensor, tau: Tensor) -> Tensor:
    """L1-normalises logits and pulls them towards the assignment; see ``reference``."""
    # A sum of magnitudes overflows float16 and drowns EPS in bfloat16.
    z = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    alpha = z[..., :-1] / (z.abs().sum(-1, keepdim=True) + EPS)
    return ((1 - tau) * alpha + tau * beta).to(logits.dtype)


def basis_logits(rows: Tensor, fc3: Tensor, bias: Tensor, first_cell: int) -> Tensor:
    """Logits through a non-local basis; see ``reference``."""
    num_nonlocal, num_basis = fc3.shape
    own, basis, zero = rows.split((rows.shape[-1] - num_basis - 1, num_basis, 1), dim=-1)
    before, after = F.linear(basis, fc3).split((first_cell, num_nonlocal - first_cell), dim=-1)
    logits = torch.cat((before, own, after, zero), dim=-1)
    return logits + bias.view(logits.shape[1:])
