"""The operators of assembly in PyTorch's dispatcher.

An operator has one schema, one rule for shapes, one gradient and one count of FLOPs, and an
implementation for each kind of device. Compilers, tracers, transforms and modes see the operator;
the dispatcher decides who computes it.

Assembly is linear in the mixing weights and in the cells. So its two gradients are linear too, and
the gradient of each of the three operators consists of the other two: these are derivatives of
every order.

Before torch 2.4, which lacks the functions for this, the functions of ``products`` have the same
names here, and torch differentiates them.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import cpu, cuda, dispatch, products
from .attention import logit_norms, mixing_weights, mixing_weights_grad
from .layout import block_shape, cut_kernel, memory_shape, positions_last, view_as_kernel
from .products import scales_by_block, with_constant

# Whether they are registered with the dispatcher.
ARE_REGISTERED = dispatch.IS_POSSIBLE


def assemble(alpha: Tensor, cells: Tensor, grid: Sequence[int], kernel_size: Sequence[int],
             scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Mixes cells to kernels (method, section 4); ``reference.assemble_kernel`` reads it out.

    Args:
        alpha: Mixing weights ``(N, m, n)``, of any floating-point dtype.
        cells: ``(n, c_out, c_in, *k)``, likewise.
        grid: ``(S, OG, IG)``, positions and groups of cells that tile the kernel; m in all.
        kernel_size: Of the kernel.
        scale: Factors of the output channels, ``(OG * c_out,)``, or None for 1.
        dtype: Of the kernels.

    Returns:
        ``(N, OG * c_out, IG * c_in, *kernel_size)``, new memory in the order of
        ``layout.memory_shape``.
    """
    return _assemble(alpha, cells, grid, kernel_size, scale, dtype)


def assemble_logits(logits: Tensor, beta: Tensor | None, tau: Tensor | None, cells: Tensor,
                    grid: Sequence[int], kernel_size: Sequence[int], scale: Tensor | None,
                    dtype: torch.dtype) -> Tensor:
    """``assemble`` of ``mixing_weights(logits, beta, tau)`` (method, sections 3 and 4).

    Args:
        logits: z, ``(N, m, n + 1)``.
        beta: The assignment ``(m, n)``, or None, as tau, for a temperature of 0.
        tau: The temperature, 0-dimensional; has no gradient, nor has beta.
        cells: As ``assemble`` takes them, and all that follow.
        grid: ``(S, OG, IG)``.
        kernel_size: Of the kernel.
        scale: Factors of the output channels, or None.
        dtype: Of the kernels.

    Returns:
        As ``assemble``.
    """
    return _assemble_logits(logits, beta, tau, cells, grid, kernel_size, scale, dtype)


def assemble_grad_alpha(pieces: Tensor, cells: Tensor) -> Tensor:
    """``sum_d pieces[.., d] cells[j, d]``, the gradient of mixing weights.

    Args:
        pieces: Gradient of kernels as ``cut_kernel`` cuts it, any strides.
        cells: ``(n, c_out, c_in, *k)``.

    Returns:
        ``(N, m, n)``, at least in single precision.
    """
    return _assemble_grad_alpha(pieces, cells)


def assemble_grad_cells(pieces: Tensor, alpha: Tensor) -> Tensor:
    """``sum_i alpha[i, j] pieces[i]``, the gradient of cells.

    Args:
        pieces: Gradient of kernels as ``cut_kernel`` cuts it, any strides.
        alpha: ``(N, m, n)``.

    Returns:
        ``(n, c_out, c_in, prod(k))``, in the dtype of the pieces.
    """
    return _assemble_grad_cells(pieces, alpha)


def mix_bases(hidden: Tensor, logits: Tensor, bases: Tensor, grid: Sequence[int],
              kernel_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """``(h @ bases[b, :-1] + bases[b, -1]) / logit_norms(z)[:, i]`` for every block b of every
    mixture i; see ``kw_mm.ops.bases``.

    Args:
        hidden: h, not negative, ``(N, hidden)``.
        logits: z, ``(N, m, n + 1)``.
        bases: ``(B, hidden + 1, width)``.
        grid: ``(S, OG, IG)``, the places of mixtures in the kernel; m in all.
        kernel_shape: ``(C_out, C_in, *k)``.
        dtype: Of the kernels.

    Returns:
        ``(N, *kernel_shape)``, new memory in the order (N, C_out, k, C_in).
    """
    return _mix_bases(hidden, logits, bases, grid, kernel_shape, dtype)


if not ARE_REGISTERED:
    _assemble, _assemble_grad_alpha = products.assemble, products.assemble_grad_alpha
    _assemble_grad_cells, _mix_bases = products.assemble_grad_cells, products.mix_bases
    _assemble_logits = products.assemble_logits
else:
    # Devices other than CPUs and CUDA compute with torch's products.
    _MODULES = dict(CompositeExplicitAutograd=products, CPU=cpu, CUDA=cuda)

    # assemble

    def _fake_assemble(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                       kernel_size: Sequence[int], scale: Tensor | None,
                       dtype: torch.dtype) -> Tensor:
        memory = cells.new_empty(memory_shape(alpha.shape[0], grid, cells.shape), dtype=dtype)
        return view_as_kernel(memory, grid, cells.shape, kernel_size)

    def _setup_assemble(ctx: Any, inputs: tuple) -> None:
        alpha, cells, ctx.grid, ctx.kernel_size, scale, _ = inputs
        ctx.save_for_backward(alpha, cells, scale)

    def _assemble_backward(ctx: Any, grad: Tensor) -> tuple:
        alpha, cells, scale = ctx.saved_tensors
        needs = [ctx.needs_input_grad[i] for i in (0, 1, 4)]
        grad_alpha, grad_cells, grad_scale = _assembly_gradients(
            grad, alpha, cells, scale, ctx.grid, ctx.kernel_size, needs)
        return grad_alpha, grad_cells, None, None, grad_scale, None

    def _assembly_gradients(grad: Tensor, alpha: Tensor, cells: Tensor, scale: Tensor | None,
                            grid: Sequence[int], kernel_size: Sequence[int],
                            needs: Sequence[bool]) -> tuple[Any, Any, Any]:
        """Those of mixing weights, cells and scale that are needed, from that of kernels."""
        grad_scale = None
        if needs[2] and scale is not None:
            kernel = assemble(alpha, cells, grid, kernel_size, None, grad.dtype)
            grad_scale = (grad * kernel).transpose(0, 1).flatten(1).sum(1).to(scale.dtype)
        if scale is not None:
            grad = grad * scale.to(grad.dtype).view(-1, *(1,) * (grad.dim() - 2))
        pieces = cut_kernel(grad, grid, cells.shape[1:])
        grad_alpha = grad_cells = None
        if needs[0]:
            grad_alpha = assemble_grad_alpha(pieces, cells).to(alpha.dtype)
        if needs[1]:
            grad_cells = assemble_grad_cells(pieces, alpha).view(cells.shape).to(cells.dtype)
        return grad_alpha, grad_cells, grad_scale

    # assemble_logits

    def _fake_assemble_logits(logits: Tensor, beta: Tensor | None, tau: Tensor | None,
                              cells: Tensor, grid: Sequence[int], kernel_size: Sequence[int],
                              scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        return _fake_assemble(logits, cells, grid, kernel_size, scale, dtype)

    def _setup_assemble_logits(ctx: Any, inputs: tuple) -> None:
        logits, beta, tau, cells, ctx.grid, ctx.kernel_size, scale, _ = inputs
        ctx.save_for_backward(logits, beta, tau, cells, scale)

    def _assemble_logits_backward(ctx: Any, grad: Tensor) -> tuple:
        logits, beta, tau, cells, scale = ctx.saved_tensors
        needs_logits, needs_cells, needs_scale = (ctx.needs_input_grad[i] for i in (0, 3, 6))
        alpha = mixing_weights(logits, beta, tau)
        grad_alpha, grad_cells, grad_scale = _assembly_gradients(
            grad, alpha, cells, scale, ctx.grid, ctx.kernel_size,
            (needs_logits, needs_cells, needs_scale))
        grad_logits = mixing_weights_grad(grad_alpha, logits, tau) if needs_logits else None
        return grad_logits, None, None, grad_cells, None, None, grad_scale, None

    # Gradients

    def _assemble_pieces(alpha: Tensor, cells: Tensor, like: Tensor) -> Tensor:
        """Mixtures of cells as pieces, the form that both gradients take."""
        cells, grid = cells.flatten(3), like.shape[1:4]
        kernel = assemble(alpha, cells, grid, (grid[0] * cells.shape[3],), None, like.dtype)
        return cut_kernel(kernel, grid, cells.shape[1:])

    def _fake_grad_alpha(pieces: Tensor, cells: Tensor) -> Tensor:
        dtype = torch.promote_types(pieces.dtype, torch.float32)
        return pieces.new_empty(pieces.shape[0], math.prod(pieces.shape[1:4]), cells.shape[0],
                                dtype=dtype)

    def _setup_gradient(ctx: Any, inputs: tuple) -> None:
        ctx.save_for_backward(*inputs)

    def _grad_alpha_backward(ctx: Any, grad: Tensor) -> tuple:
        pieces, cells = ctx.saved_tensors
        grad_pieces = grad_cells = None
        if ctx.needs_input_grad[0]:
            grad_pieces = _assemble_pieces(grad, cells, pieces)
        if ctx.needs_input_grad[1]:
            grad_cells = assemble_grad_cells(pieces, grad).view(cells.shape).to(cells.dtype)
        return grad_pieces, grad_cells

    def _fake_grad_cells(pieces: Tensor, alpha: Tensor) -> Tensor:
        return pieces.new_empty(alpha.shape[2], *pieces.shape[4:])

    def _grad_cells_backward(ctx: Any, grad: Tensor) -> tuple:
        pieces, alpha = ctx.saved_tensors
        grad_pieces = grad_alpha = None
        if ctx.needs_input_grad[0]:
            grad_pieces = _assemble_pieces(alpha, grad, pieces)
        if ctx.needs_input_grad[1]:
            grad_alpha = assemble_grad_alpha(pieces, grad).to(alpha.dtype)
        return grad_pieces, grad_alpha

    # mix_bases

    def _fake_mix_bases(hidden: Tensor, logits: Tensor, bases: Tensor, grid: Sequence[int],
                        kernel_shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        out_channels, in_channels, *kernel_size = kernel_shape
        memory = bases.new_empty(hidden.shape[0], out_channels, math.prod(kernel_size),
                                 in_channels, dtype=dtype)
        return positions_last(memory, kernel_size)

    def _setup_mix_bases(ctx: Any, inputs: tuple) -> None:
        ctx.save_for_backward(*inputs[:3])
        ctx.grid, ctx.kernel_shape = inputs[3:5]

    def _mix_bases_backward(ctx: Any, grad: Tensor) -> tuple:
        hidden, logits, bases = ctx.saved_tensors
        weights, scales = with_constant(hidden), 1 / logit_norms(logits)
        grad = grad.flatten(3).transpose(2, 3).reshape(len(grad), len(bases), bases.shape[2])
        # By block, (B, N, ...).
        grad = grad.transpose(0, 1)
        by_block = scales_by_block(scales, ctx.grid, ctx.kernel_shape).T.unsqueeze(-1)
        grad_bases = None
        if ctx.needs_input_grad[2]:
            factors = (by_block * weights).transpose(1, 2)
            grad_bases = (factors.to(grad.dtype) @ grad).to(bases.dtype)
        # The contribution of each block to the gradient of weights and scales.
        shares = (grad @ bases.transpose(1, 2).to(grad.dtype)).to(scales.dtype)
        grad_hidden = (shares * by_block).sum(0)[:, :-1].to(hidden.dtype)
        # (N, OG, c_out, S, positions, IG) to (N, S, OG, IG)
        grad_scales = (shares * weights).sum(-1).T.unflatten(
            1, block_shape(ctx.grid, ctx.kernel_shape)).sum((2, 4)).transpose(1, 2)
        grad_norms = -grad_scales.reshape(scales.shape) * scales.square()
        grad_logits = grad_norms.unsqueeze(-1).to(logits.dtype) * logits.sign()
        return grad_hidden, grad_logits, grad_bases, None, None, None

    _assemble = dispatch.register(
        'assemble(Tensor alpha, Tensor cells, SymInt[] grid, SymInt[] kernel_size, '
        'Tensor? scale, ScalarType dtype) -> Tensor',
        _MODULES, _fake_assemble, _setup_assemble, _assemble_backward)
    _assemble_logits = dispatch.register(
        'assemble_logits(Tensor logits, Tensor? beta, Tensor? tau, Tensor cells, SymInt[] grid, '
        'SymInt[] kernel_size, Tensor? scale, ScalarType dtype) -> Tensor',
        _MODULES, _fake_assemble_logits, _setup_assemble_logits, _assemble_logits_backward)
    _assemble_grad_alpha = dispatch.register(
        'assemble_grad_alpha(Tensor pieces, Tensor cells) -> Tensor',
        _MODULES, _fake_grad_alpha, _setup_gradient, _grad_alpha_backward)
    _assemble_grad_cells = dispatch.register(
        'assemble_grad_cells(Tensor pieces, Tensor alpha) -> Tensor',
        _MODULES, _fake_grad_cells, _setup_gradient, _grad_cells_backward)
    _mix_bases = dispatch.register(
        'mix_bases(Tensor hidden, Tensor logits, Tensor bases, SymInt[] grid, '
        'SymInt[] kernel_shape, ScalarType dtype) -> Tensor',
        _MODULES, _fake_mix_bases, _setup_mix_bases, _mix_bases_backward)

    # Imported here, because torch versions without operators lack it.
    from torch.utils.flop_counter import register_flop_formula

    # FLOPs, as torch counts them: multiplications and additions.

    @register_flop_formula(torch.ops.kw_mm.assemble)
    def _assemble_flops(alpha: Sequence[int], cells: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(alpha) * math.prod(cells[1:])

    @register_flop_formula(torch.ops.kw_mm.assemble_logits)
    def _assemble_logits_flops(logits: Sequence[int], beta: Any, tau: Any, cells: Sequence[int],
                               *_: Any, **__: Any) -> int:
        return 2 * math.prod(logits[:-1]) * math.prod(cells)

    @register_flop_formula(torch.ops.kw_mm.assemble_grad_alpha)
    def _grad_alpha_flops(pieces: Sequence[int], cells: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(pieces) * cells[0]

    @register_flop_formula(torch.ops.kw_mm.assemble_grad_cells)
    def _grad_cells_flops(pieces: Sequence[int], alpha: Sequence[int], *_: Any, **__: Any) -> int:
        return 2 * math.prod(pieces) * alpha[2]

    @register_flop_formula(torch.ops.kw_mm.mix_bases)
    def _mix_bases_flops(hidden: Sequence[int], logits: Sequence[int], bases: Sequence[int],
                         *_: Any, **__: Any) -> int:
        return 2 * hidden[0] * math.prod(bases)
