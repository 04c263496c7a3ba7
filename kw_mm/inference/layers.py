"""KW convolutions for inference, without norms, a changing temperature or trainable parameters."""
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Attention
from ..layers.conv import KWConv, convolve
from ..layers.warehouse import CellUser
from ..ops import (
    assemble_kernel,
    assemble_logits,
    contract_bases,
    hidden_units,
    mean_positions,
    mix_bases,
    mixing_weights,
    triton_is_wanted,
)
from ..ops.autocast import autocast_dtype, product_dtype, widest_dtype

NOT_TRAINABLE = ('what was optimized for inference cannot be trained; optimize a copy '
                 '(copy.deepcopy) of the model and train the model')


class Affine(NamedTuple):
    """``y * scale + shift`` for each output channel, ``(out,)`` each."""

    scale: Tensor
    shift: Tensor


def fold_norm(norm: Any) -> Affine:
    """What a batch norm does to its input in evaluation."""
    device = norm.running_var.device
    factory = dict(device=device, dtype=widest_dtype(device))
    weight = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
    bias = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
    scale = weight.to(**factory) / (norm.running_var.to(**factory) + norm.eps).sqrt()
    return Affine(scale, bias.to(**factory) - norm.running_mean.to(**factory) * scale)


class OptimizedAttention(nn.Module):
    """The attention up to its logits, batch norm folded into the first layer.

    Args:
        attention: The attention it computes. Its linear layers are plain ones (``is_plain``).
    """

    weight: Tensor
    bias: Tensor | None
    beta: Tensor
    tau: Tensor

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        weight: Tensor
        bias: Tensor | None
        weight, bias = attention.fc1.weight, attention.fc1.bias
        self.norm = None
        if isinstance(attention.norm1, nn.LayerNorm):
            self.norm = attention.norm1
        else:
            scale, shift = fold_norm(attention.norm1)
            bias = (shift if bias is None else shift + bias * scale).to(weight.dtype)
            weight = (weight * scale[:, None]).to(weight.dtype)
        for name, tensor in (('weight', weight), ('bias', bias)):
            self.register_buffer(name, tensor.detach().clone())
        for name in ('fc2', 'fc3', 'basis_bias', 'num_mixtures', 'first_cell', 'basis_split'):
            setattr(self, name, getattr(attention, name))
        # Read here, because reading it in each forward pass would synchronise.
        self.tied = attention.is_tied
        # In the state dict, because they cannot be derived from anything else.
        for name in ('beta', 'tau') if self.tied else ():
            self.register_buffer(name, getattr(attention, name))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        # mmengine would load the keys that fit, so that cells were new and bases old, and only log
        # the rest.
        if f'{prefix}fc1.weight' in state_dict:
            raise ValueError(f'{prefix}fc1.weight of the checkpoint is that of a layer as it is '
                             'trained; load it before optimize_for_inference_')
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden vector ``(N, hidden)`` of an input ``(N, C, *spatial)``."""
        pooled = mean_positions(x, self.weight.dtype)
        if self.norm is None:
            return hidden_units(pooled, self.weight, self.bias)
        return F.relu(self.norm(F.linear(pooled, self.weight, self.bias)))

    logits: Any = Attention.logits  # parts that Attention has as well

    def forward(self, x: Tensor) -> Tensor:
        """Mixing weights ``(N, m, n)`` of an input ``(N, C, *spatial)``."""
        return mixing_weights(self.logits(self.hidden(x)), *self.assignment)

    @property
    def assignment(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """beta and tau, where the temperature is not 0."""
        return (self.beta, self.tau) if self.tied else (None, None)


class OptimizedConv(CellUser):
    """A KW convolution for inference, with the same output.

    Its kernels are mixed from cells, or from bases if it has them; see ``kw_mm.ops.bases``.

    Args:
        conv: The layer it replaces. It takes over that layer's parameters, which no longer require
            gradients, and refers to the same cells.
        affine: A norm behind the convolution that is folded into it.
        use_bases: Whether to compute bases.
        storage_dtype: Dtype of the bases; by default that of the cells.
    """

    transposed = False  # read by mmcv.cnn.ConvModule
    has_fixed_temperature = True  # read by set_temperature

    kernel_size: tuple[int, ...]
    attention: OptimizedAttention
    bases: Tensor | None
    bias: Tensor | None
    scale: Tensor | None

    def __init__(self, conv: KWConv, affine: Affine | None = None, use_bases: bool = False,
                 storage_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        for name in ('num_dims', 'in_channels', 'out_channels', 'kernel_size', 'stride', 'padding',
                     'dilation', 'groups', 'padding_mode', 'pads', 'pad_input', 'output_padding',
                     'plan'):
            setattr(self, name, getattr(conv, name))
        self._use_manager(conv.manager, 'warehouse_manager' in conv._modules)
        self.attention = OptimizedAttention(conv.attention)
        dtype = conv.cells.dtype
        bias: Tensor | None = conv.bias
        scale: Tensor | None = None
        if affine is not None:
            scale, shift = affine
            bias = (shift if bias is None else shift + bias * scale).to(dtype)
            scale = scale.to(dtype)
        bias = None if bias is None else bias.detach().clone()
        self.register_buffer('scale', scale)
        self.register_buffer('bias', bias)
        self.register_buffer(
            'bases', self._contract().to(storage_dtype or dtype) if use_bases else None)
        self.requires_grad_(False)
        self.eval()

    @property
    def num_bases(self) -> int:
        """Bases that kernels are mixed from, hidden + 1; 0 if they are mixed from cells."""
        return 0 if self.bases is None else self.bases.shape[1]

    @property
    def num_bytes(self) -> int:
        """Memory that the bases take."""
        return 0 if self.bases is None else self.bases.nbytes

    def train(self, mode: bool = True) -> OptimizedConv:
        """Keeps evaluation mode.

        Raises:
            RuntimeError: If ``mode`` is True.
        """
        if mode:
            raise RuntimeError(NOT_TRAINABLE)
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves ``(N, C_in, *spatial)``, each sample with its own kernel; N may be 0.

        Raises:
            ValueError: If ``x`` has no batch dimension or another number of channels.
        """
        return convolve(self, x, self.kernel)

    def kernel(self, x: Tensor) -> Tensor:
        """The kernels for an input ``(N, C_in, *spatial)``: ``(N, C_out, C_in / groups, *k)``."""
        # Cells and bases may be stored in a lower precision.
        dtype = product_dtype(x)
        device = x.device.type
        if autocast_dtype(device) is None:
            return self._kernel(x, dtype)
        # As in training, the attention computes in its own precision.
        with torch.autocast(device, enabled=False):
            return self._kernel(x, dtype)

    def _kernel(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        attention, grid = self.attention, self.plan.grid
        if self.bases is not None:
            hidden = attention.hidden(x)
            return mix_bases(hidden, attention.logits(hidden), self.bases, grid,
                             self.plan.spec.weight_shape, dtype)
        if not triton_is_wanted():
            return assemble_kernel(attention(x), self.cells_as(dtype), grid, self.kernel_size,
                                   self.scale, dtype)
        logits, (beta, tau) = attention.logits(attention.hidden(x)), attention.assignment
        return assemble_logits(logits, beta, tau, self.cells_as(dtype), grid, self.kernel_size,
                               self.scale, dtype)

    @torch.no_grad()
    def _contract(self) -> Tensor:
        hidden = self.attention.weight.new_zeros(self.plan.hidden + 1, self.plan.hidden)
        hidden[:-1].fill_diagonal_(1)
        logits = self.attention.logits(hidden)[..., :-1]
        bias, weight = logits[-1], logits[:-1] - logits[-1]
        return contract_bases(weight.permute(1, 2, 0), bias, self.cells, self.plan.grid,
                              self.scale)

    def extra_repr(self) -> str:
        return (f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
                f'stride={self.stride}, warehouse={self.plan.warehouse}, '
                f'm={self.plan.num_mixtures}, '
                + (f'n={self.plan.num_cells}' if self.bases is None else
                   f'bases={self.num_bases}'))
