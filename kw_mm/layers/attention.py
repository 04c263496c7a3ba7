"""The attention of a layer, which computes mixing weights from an image."""
from __future__ import annotations

import math
import warnings
from numbers import Real
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..arguments import checks_arguments
from ..ops import mean_positions, mixing_weights, order_logits
from ..ops.autocast import autocast_dtype, widest_dtype
from ..plan import LayerPlan

# A norm that is not trained takes its statistics from so many batches. With one or two images each,
# that is enough for a mean and a variance, and short beside the warm-up of a training.
SETTLING_BATCHES = 50


class AttentionBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d that trains with any number of samples, and can settle its statistics.

    A single sample has no variance. Batches of one sample, and empty ones, are normalised with the
    running statistics and do not change them.

    In a network whose norms stay in evaluation mode, the norm of a new attention would keep mean 0
    and variance 1 forever. After ``settle`` it takes them from the first batches.
    """

    running_mean: Tensor  # which this norm always has
    running_var: Tensor
    num_batches_tracked: Tensor
    settling = False

    def settle(self) -> None:
        """Sets evaluation mode; statistics that were never computed follow the next batches.

        They become the statistics of all samples of the next ``SETTLING_BATCHES`` batches (of all
        processes), counted by ``num_batches_tracked``, and then stay. Meanwhile each batch is
        normalised with the statistics so far. Settling ends with the next call of ``train`` or
        ``eval``.
        """
        self.eval()
        if not self.running_mean.is_meta:
            count = int(self.num_batches_tracked)
            is_new = not self.running_mean.any() and bool((self.running_var == 1).all())
            self.settling = is_new if count == 0 else count < SETTLING_BATCHES

    def train(self, mode: bool = True) -> AttentionBatchNorm:
        """Sets the mode; statistics no longer settle."""
        self.settling = False
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises ``(N, hidden)``."""
        if self.training and len(x) > 1:
            return super().forward(x)
        follows = self.settling and not _is_recomputed()
        mean, var = self._follow(x) if follows else (self.running_mean, self.running_var)
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=False, eps=self.eps)

    @torch.no_grad()
    def _follow(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Adds a batch to the statistics. Returns copies, because graphs hold on to them."""
        x = x.to(widest_dtype(x.device))
        sums = torch.cat((x.new_tensor([len(x)]), x.sum(0), x.square().sum(0)))
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        if sums[0]:
            seen = int(self.num_batches_tracked)
            mean, var = (s.to(x.dtype) for s in (self.running_mean, self.running_var))
            # Moments are averaged, because a single sample has moments but no variance. The first
            # batch replaces mean 0 and variance 1.
            moments = torch.stack((mean, var + mean.square()))
            moments += (sums[1:].view(2, -1) / sums[0] - moments) / (seen + 1)
            self.running_mean.copy_(moments[0])
            self.running_var.copy_((moments[1] - moments[0].square()).clamp(min=0))
            self.num_batches_tracked += 1
            self.settling = seen + 1 < SETTLING_BATCHES
        return self.running_mean.clone(), self.running_var.clone()


class Attention(nn.Module):
    """Contrasting-driven attention of one layer (method, section 3).

    Averages the input over positions, applies ``fc1 -> norm1 -> ReLU -> fc2``, and normalises. With
    a non-local basis, ``fc3`` and ``basis_bias`` complete the logits.

    The assignment ``beta (m, n)`` and the temperature ``tau`` move with the module, but are not in
    its state dict. tau is a float64 scalar (float32 on devices without float64), 0 at first, and
    stays so when the module's dtype changes. When the module gets new memory, as from ``to_empty``
    or ``load_state_dict(assign=True)``, both are written again.

    Args:
        plan: All sizes.
        device: Of the parameters, as in torch.
        dtype: Of the parameters, as in torch.
    """

    beta: Tensor
    tau: Tensor
    fc3: nn.Linear | None
    basis_bias: Any  # a parameter, with fc3, or None
    basis_split: tuple[int, int, int] | None

    def __init__(self, plan: LayerPlan, device=None, dtype=None) -> None:
        super().__init__()
        factory = dict(device=device, dtype=dtype)
        m, n, own = plan.num_mixtures, plan.num_cells, plan.assignment
        self.num_mixtures = m
        self.first_cell = own.first_cell
        batch_norm = plan.attn_norm == 'BN1d'
        norm = AttentionBatchNorm if batch_norm else nn.LayerNorm
        self.fc1 = nn.Linear(plan.spec.in_channels, plan.hidden, bias=not batch_norm, **factory)
        self.norm1 = norm(plan.hidden, **factory)
        if plan.num_basis:
            self.basis_split = own.num_cells, plan.num_basis, 1
            width = own.num_cells + plan.num_basis + 1
            self.fc2 = nn.Linear(plan.hidden, m * width, bias=False, **factory)
            self.fc3 = nn.Linear(plan.num_basis, n - own.num_cells, bias=False, **factory)
            self.basis_bias = nn.Parameter(torch.zeros(m * (n + 1), **factory))
        else:
            self.fc2 = nn.Linear(plan.hidden, m * (n + 1), **factory)
            self.basis_split = self.fc3 = self.basis_bias = None
        part: Any
        for part in self.children():
            part.is_part_of_kw_layer = True  # read by kw_mm.compat
        self.assignment = own
        self.register_buffer('beta', torch.empty(m, n, **factory), persistent=False)
        self.register_buffer('tau', _on_device(None, self.beta.device), persistent=False)
        self._write_beta()
        self.reset_parameters()

    @property
    def is_plain(self) -> bool:
        """Whether its linear layers are what they were built as (see ``is_plain``)."""
        return all(layer is None or is_plain(layer) for layer in (self.fc1, self.fc2, self.fc3))

    @property
    def is_tied(self) -> bool:
        """Whether the temperature is not 0. On the meta device it counts as 0."""
        return not self.tau.is_meta and bool(self.tau)

    def reset_parameters(self) -> None:
        """Draws initial values (method, section 5).

        A linear layer that was wrapped or replaced since (see ``is_plain``) keeps its values.
        """
        for name in ('fc1', 'fc2', 'fc3'):
            layer = getattr(self, name)
            if layer is None:
                continue
            if not is_plain(layer):
                warnings.warn(f'{name} of an attention keeps its values: it is no longer the '
                              f'nn.Linear that it was built as, but wrapped, pruned or replaced, '
                              f'{layer}', stacklevel=2)
                continue
            if layer.weight.is_meta:  # nothing to draw, and torch would take long to do so
                continue
            nn.init.kaiming_normal_(layer.weight, mode='fan_out', nonlinearity='relu')
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.norm1.reset_parameters()
        if self.basis_bias is not None:
            nn.init.zeros_(self.basis_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Mixing weights ``(N, m, n)`` of an input ``(N, C, *spatial)``.

        Under autocast they keep the precision of the parameters, because the attention is little
        work, and gradients of its norm and of the mixing weights exceed the range of float16.
        """
        return mixing_weights(self.logits_of(x), self.beta, self.tau)

    def logits_of(self, x: Tensor) -> Tensor:
        """Logits ``(N, m, n + 1)`` of an input ``(N, C, *spatial)``, in the same precision."""
        device = self.beta.device.type
        if autocast_dtype(device) is None:
            return self._logits_of_means(mean_positions(x))
        with torch.autocast(device, enabled=False):
            return self._logits_of_means(mean_positions(x, self.beta.dtype))

    def _logits_of_means(self, pooled: Tensor) -> Tensor:
        # Call modules, never read their weights: they may be quantized, pruned or wrapped.
        return self.logits(F.relu(self.norm1(self.fc1(pooled))))

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(N, m, n + 1)`` of hidden vectors ``(N, hidden)``."""
        rows = self.fc2(hidden)
        logits = rows.view(rows.shape[0], self.num_mixtures, rows.shape[1] // self.num_mixtures)
        if self.fc3 is None:
            return logits
        own, basis, zero = logits.split(self.basis_split, dim=-1)
        return order_logits(own, self.fc3(basis), zero, self.basis_bias, self.first_cell)

    def _apply(self, fn, recurse: bool = True):
        beta = self.beta
        tau: Any = self._buffers.pop('tau')
        try:
            super()._apply(fn, recurse)
            moved = tau if self.beta.device.type == 'mps' else fn(tau)
        finally:
            self._buffers['tau'] = tau
        # New memory, as from to_empty, may contain anything.
        if self.beta is not beta:
            self._write_beta()
        if moved is not tau or moved.device.type != self.beta.device.type:
            self.tau = _on_device(tau, self.beta.device)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get('assign_to_params_buffers'):
            # The tensors of the state dict replace ours, and may be on another device.
            new = next((value for key, value in state_dict.items() if key.startswith(prefix)
                        and isinstance(value, Tensor) and value.is_floating_point()), self.beta)
            if (new.device, new.dtype) != (self.beta.device, self.beta.dtype):
                self.beta = torch.empty_like(self.beta, device=new.device, dtype=new.dtype)
                self._write_beta()
                self.tau = _on_device(self.tau, new.device)

    @torch.no_grad()
    def _write_beta(self) -> None:
        if self.beta.is_meta:
            return
        ties = [(row, cell) for row, cell in enumerate(self.assignment.columns) if cell is not None]
        # On the CPU, even if another device is the default.
        beta = torch.zeros(self.beta.shape, device='cpu')
        beta[tuple(torch.tensor(ties, device='cpu', dtype=torch.long).view(-1, 2).T)] = 1
        self.beta.copy_(beta)


def _is_recomputed() -> bool:
    """Whether a forward pass runs inside of a backward pass, repeated by checkpointing."""
    # Not public. Where torch lacks it, such batches are counted twice.
    return getattr(torch._C, '_current_graph_task_id', lambda: -1)() >= 0


def _on_device(tau: Tensor | None, device: torch.device) -> Tensor:
    """The temperature on a device; 0 if there is none or it was on the meta device."""
    if tau is None or tau.is_meta:
        tau = torch.zeros((), dtype=torch.float64, device='cpu')
    return tau.to(device, widest_dtype(device))


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer computes with its own weight only, which may be replaced by another.

    An ``nn.Linear`` does, but not after pruning, spectral or weight norm, other parametrizations or
    quantization, and not an adapter in its place.
    """
    return type(layer) is nn.Linear and 'weight' in layer._parameters


@checks_arguments('tau')
def set_temperature(module: nn.Module, tau: float) -> int:
    """Sets the temperature of every KW layer inside a module, itself included.

    Args:
        module: Any module, wrapped for distributed training or not.
        tau: In [0, 1]: 1 is the initial one-to-one assignment, 0 only the learned attention.

    Returns:
        How many layers there are.

    Raises:
        TypeError: If ``tau`` is no number.
        ValueError: If it is not in [0, 1], or the module was optimized for inference, which fixes
            the temperature.
    """
    if isinstance(tau, bool) or not isinstance(tau, Real):
        raise TypeError(f'tau must be a number in [0, 1], got {tau!r}')
    if math.isnan(tau) or not 0 <= tau <= 1:
        raise ValueError(f'tau must be a number in [0, 1], got {tau!r}')
    for name, child in module.named_modules():
        if getattr(child, 'has_fixed_temperature', False):
            raise ValueError(f'module must not be optimized for inference, which fixes the '
                             f'temperature of its layers, as of {name!r}; set tau before')
    attentions = [m for m in module.modules() if isinstance(m, Attention)]
    for attention in attentions:
        attention.tau.fill_(tau)
    return len(attentions)
