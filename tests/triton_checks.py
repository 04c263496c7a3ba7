"""Helpers for tests of the Triton kernels."""
from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kw_mm import ops
from kw_mm.ops import cuda, products, triton_assembly, triton_support
from kw_mm.ops.layout import cut_kernel

DEVICE = 'cpu' if triton_support._is_interpreted() else 'cuda'

KERNELS = {'_assemble_kernel', '_grad_alpha_kernel', '_grad_cells_kernel'}
BASES_KERNEL = '_mix_bases_kernel'

GUARD = 64  # elements around every buffer, enough to keep it aligned


def mend_bfloat16() -> None:
    """Makes the interpreter round to bfloat16 and multiply it like GPUs.

    It stores bfloat16 as 16 bits. Triton 3.7 truncates float32 to these, converts float64 as if the
    bits were an integer, and multiplies the bits in tl.dot.
    """
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def float32(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended_cast(self, src, dst_type):
        src = float32(src)
        if dst_type.scalar != tl.bfloat16:
            return cast(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)

    def mended_dot(self, a, b, d, *options):
        return dot(self, float32(a), float32(b), d, *options)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = mended_cast, mended_dot


mend_bfloat16()

if DEVICE == 'cpu':
    # Registers the GPU's implementations for the CPU.
    _library = torch.library.Library('kw_mm', 'IMPL')
    with warnings.catch_warnings():
        # torch warns about overriding, even on request.
        warnings.simplefilter('ignore')
        for _name in ('assemble', 'assemble_grad_alpha', 'assemble_grad_cells',
                      'assemble_logits', 'mix_bases'):
            _library.impl(_name, getattr(cuda, _name), 'CPU', allow_override=True)


class Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Callable, name: str, launches: collections.Counter) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: Sequence[int]) -> Callable:
        self.launches[self.name] += 1
        return self.kernel[grid]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter]:
    """Asks for Triton, and counts launches by the kernels' names."""
    counter = collections.Counter()
    for name in (*KERNELS, BASES_KERNEL):
        monkeypatch.setattr(triton_assembly, name,
                            Counted(getattr(triton_assembly, name), name, counter))
    ops.use_triton()
    yield counter
    ops.use_triton(False)


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True)


def gradients(out: Tensor, weights: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    # A loop over no samples has no graph. Adding zero gives it one.
    total = (out * weights.to(out.dtype)).sum() + sum(t.sum() * 0 for t in leaves)
    return list(torch.autograd.grad(total, leaves))


def check(function: Callable, twin: Callable, leaves: Sequence[Tensor]) -> Tensor:
    """Compares float64 outputs and gradients of two functions, and returns the output."""
    out, expected = function(*leaves), twin(*leaves)
    assert out.shape == expected.shape and out.dtype == expected.dtype
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(expected)
    for actual, wanted in zip(gradients(out, weights, leaves),
                              gradients(expected, weights, leaves)):
        torch.testing.assert_close(actual, wanted, rtol=1e-12, atol=1e-12)
    return out


def check_precision(function: Callable, leaves: Sequence[Tensor]) -> None:
    """In the leaves' dtype, or autocast's, errors against float64 are at most twice torch's."""
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    weights, results = None, []
    for use_triton, inputs in ((True, leaves), (False, leaves), (False, exact_leaves)):
        ops.use_triton(use_triton)
        out = function(*inputs)
        if weights is None:
            weights = torch.randn(out.shape, device=DEVICE).half()
        results.append([out, *gradients(out, weights, inputs)])
    ops.use_triton()
    compare_errors(*results)


def check_functions(alpha: Tensor, cells: Tensor, grid: Sequence[int],
                    kernel_size: Sequence[int]) -> None:
    """The same for the functions themselves, not called through the dispatcher."""
    alpha, cells = alpha.detach(), cells.detach()
    exact = alpha.double(), cells.double()
    results = []
    for module, inputs in ((triton_assembly, (alpha, cells)), (products, (alpha, cells)),
                           (products, exact)):
        kernel = module.assemble(*inputs, grid, kernel_size, None, inputs[1].dtype)
        if not results:
            weights = torch.randn_like(kernel).bfloat16()
        pieces = cut_kernel(weights.to(kernel.dtype), grid, cells.shape[1:])
        results.append([kernel, module.assemble_grad_alpha(pieces, inputs[1]),
                        module.assemble_grad_cells(pieces, inputs[0])])
    compare_errors(*results)


def compare_errors(ours: Sequence[Tensor], torchs: Sequence[Tensor],
                   exact: Sequence[Tensor]) -> None:
    for i, (a, b, wanted) in enumerate(zip(ours, torchs, exact)):
        assert a.dtype == b.dtype and a.shape == b.shape
        errors = [(t.double() - wanted).norm().item() for t in (a, b)]
        assert errors[0] <= 2 * errors[1], (i, errors)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Fills every ``torch.empty`` with NaN, and surrounds it by NaN that must stay."""
    buffers = []
    empty = torch.empty

    def poisoned(*size, **options) -> Tensor:
        shape = size[0] if isinstance(size[0], (tuple, list)) else size
        numel = torch.Size(shape).numel()
        buffer = empty(numel + 2 * GUARD, **options).fill_(torch.nan)
        buffers.append(buffer)
        return buffer[GUARD:GUARD + numel].view(shape)

    monkeypatch.setattr(torch, 'empty', poisoned)
    yield buffers
    assert buffers
    for buffer in buffers:
        assert not buffer[GUARD:-GUARD].isnan().any()
        assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()
