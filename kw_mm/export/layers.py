"""KW layers as other runtimes get them, of operations that all of these have."""
from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..inference import OptimizedConv
from ..inference.layers import OptimizedAttention
from ..layers.warehouse import CellUser
from ..ops import logit_norms
from .products import pad, rearrange, slice_conv


class ExportConv(CellUser):
    """A KW convolution of the same output, made of operations that every runtime has.

    Args:
        conv: The layer as inference has it, norms folded, with or without bases. Its cells stay
            its manager's, so that a file has them once.
        batch_size: The only one that the layer is to take, for which it is one convolution. With
            None it takes any, and is made of slices and matrix products.
    """

    transposed = False  # read by mmcv.cnn.ConvModule
    has_fixed_temperature = True  # read by set_temperature

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    pad_input: Any
    bases: Tensor | None
    bias: Tensor | None
    scale: Tensor | None

    def __init__(self, conv: OptimizedConv, batch_size: int | None = None) -> None:
        super().__init__()
        self.batch_size = batch_size
        other: Any = conv
        for name in ('num_dims', 'in_channels', 'out_channels', 'kernel_size', 'stride', 'padding',
                     'dilation', 'groups', 'padding_mode', 'pad_input', 'output_padding', 'plan'):
            setattr(self, name, getattr(other, name))
        self._use_manager(conv.manager, 'warehouse_manager' in conv._modules)
        # As F.pad takes them: last dimension first, both sides.
        sides = other.pads
        self.pads = tuple(zip(sides[-2::-2], sides[-1::-2]))
        self.attention = ExportAttention(conv.attention)
        self.register_buffer('scale', conv.scale)
        self.register_buffer('bias', conv.bias)
        self.register_buffer('bases', None if conv.bases is None else self._order_bases(
            conv.bases.to(conv.attention.weight.dtype)))
        self.requires_grad_(False)
        self.eval()

    def _order_bases(self, blocks: Tensor) -> Tensor:
        """Bases ``(hidden + 1, kernel)`` whose mixture is in the order of the convolution."""
        bases = blocks.transpose(0, 1).flatten(1)
        if self.batch_size is not None:
            num_positions, num_out_groups, num_in_groups = self.plan.grid
            c_out, c_in, *_ = self.plan.cell_shape
            bases = bases.unflatten(1, (num_out_groups * c_out, -1, num_in_groups * c_in))
            bases = bases.transpose(2, 3).flatten(1)
        return bases.contiguous()

    def forward(self, x: Tensor) -> Tensor:
        """Convolves ``(N, C_in, *spatial)``, each sample with its own kernel; N is at least 1."""
        kernel = self.kernel(x)
        if self.pad_input is not None:
            x = self.pad_input(x)
        if self.batch_size is not None:
            return self._grouped(x, kernel)
        x = pad(x, self.pads, self.padding_mode)
        return slice_conv(x, kernel, self.bias, self.kernel_size, self.stride, self.dilation,
                          self.groups)

    def _grouped(self, x: Tensor, kernel: Tensor) -> Tensor:
        """One convolution whose groups are those of all samples."""
        batch_size = len(kernel)
        padding: Any = 0
        if self.padding_mode == 'zeros' and all(a == b for a, b in self.pads):
            padding = [a for a, _ in self.pads]
        else:
            x = pad(x, self.pads, self.padding_mode)
        convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel_size) - 1]
        kernel = kernel.flatten(0, 1).unflatten(2, self.kernel_size)
        options = self.stride, padding, self.dilation, batch_size * self.groups
        if batch_size == 1:
            # With nothing in between, runtimes compute the activation behind it along the way.
            return convolve(x, kernel, self.bias, *options)
        bias = None if self.bias is None else self.bias.repeat(batch_size)
        y = convolve(x.flatten(0, 1).unsqueeze(0), kernel, bias, *options)
        return y.unflatten(1, (batch_size, -1)).squeeze(0)

    def kernel(self, x: Tensor) -> Tensor:
        """The kernels for an input: ``(N, C_out, positions, C_in / groups)``.

        With a fixed batch size positions come last, as a convolution has them.
        """
        if self.bases is None:
            return self._from_cells(self.attention(x))
        hidden = self.attention.hidden(x)
        return self._from_bases(hidden, logit_norms(self.attention.logits(hidden)))

    @property
    def _kernel_shape(self) -> tuple[int, int]:
        """Of a kernel, behind its outputs: positions and inputs, in their order."""
        positions, inputs = math.prod(self.kernel_size), self.in_channels // self.groups
        return (positions, inputs) if self.batch_size is None else (inputs, positions)

    def _from_cells(self, alpha: Tensor) -> Tensor:
        cells = self.cells.flatten(3)
        c_out, c_in, positions = cells.shape[1:]
        kernel = alpha @ cells.flatten(1)
        # From (N, S, OG, IG, c_out, c_in, positions of a cell).
        order = (0, 2, 4, 1, 6, 3, 5) if self.batch_size is None else (0, 2, 4, 3, 5, 1, 6)
        kernel = rearrange(kernel.flatten(1), (*self.plan.grid, c_out, c_in, positions), order)
        kernel = kernel.unflatten(1, (self.out_channels, *self._kernel_shape))
        return kernel if self.scale is None else kernel * self.scale.view(-1, 1, 1)

    def _from_bases(self, hidden: Tensor, norms: Tensor) -> Tensor:
        assert self.bases is not None
        num_positions, num_out_groups, num_in_groups = self.plan.grid
        c_out, c_in, *cell_kernel = self.plan.cell_shape
        # The last basis has the weight 1.
        kernel = hidden @ self.bases[:-1] + self.bases[-1]
        positions, inputs = (num_positions, -1), (num_in_groups, c_in)
        inverse = (1 / norms).unflatten(1, self.plan.grid)
        if self.batch_size is None:
            shape, inverse = (*positions, *inputs), inverse.permute(0, 2, 1, 3)
        else:
            shape, inverse = (*inputs, *positions), inverse.permute(0, 2, 3, 1)
        kernel = kernel.unflatten(1, (num_out_groups, c_out, *shape))
        kernel = kernel * inverse[:, :, None, :, None, :, None]
        return kernel.flatten(1).unflatten(1, (self.out_channels, *self._kernel_shape))

    def extra_repr(self) -> str:
        return (f'{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, '
                f'stride={self.stride}, warehouse={self.plan.warehouse}, '
                + (f'n={self.plan.num_cells}' if self.bases is None else
                   f'bases={len(self.bases)}'))


class ExportAttention(OptimizedAttention):
    """The attention with its temperature in numbers of its own precision.

    The layer keeps tau in float64, which some runtimes lack.
    """

    tied_part: Tensor | None

    def __init__(self, attention: OptimizedAttention) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(attention.__dict__)
        for name in ('_parameters', '_buffers', '_modules'):
            self.__dict__[name] = dict(attention.__dict__[name])
        self.factor, tied_part = 1.0, None
        if self.tied:
            self.factor = 1 - self.tau.item()
            tied_part = (self.tau * self.beta).to(self.weight.dtype)
            del self.beta, self.tau
        self.register_buffer('tied_part', tied_part)

    def forward(self, x: Tensor) -> Tensor:
        """Mixing weights ``(N, m, n)`` of an input ``(N, C, *spatial)``."""
        logits = self.logits(self.hidden(x))
        alpha = logits[..., :-1] / logit_norms(logits).unsqueeze(-1)
        return alpha if self.tied_part is None else alpha * self.factor + self.tied_part


class ExportLinear(nn.Module):
    """A KW linear layer: one batched matrix product over tokens.

    Args:
        conv: The convolution of kernel size 1 that the layer has inside.
    """

    def __init__(self, conv: ExportConv) -> None:
        super().__init__()
        self.conv = conv
        own: Any = conv
        self.in_features: int = own.in_channels
        self.out_features: int = own.out_channels
        self.eval()

    @property
    def bias(self) -> Tensor | None:
        """The static bias, or None."""
        return self.conv.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(N, ..., in_features)`` to ``(N, ..., out_features)``."""
        tokens = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
        kernel = self.conv.kernel(tokens.transpose(1, 2))[:, :, 0]
        y = tokens @ kernel.transpose(1, 2)
        if self.bias is not None:
            y = y + self.bias
        return y.view(*x.shape[:-1], self.out_features)
