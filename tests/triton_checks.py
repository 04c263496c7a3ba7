"""What the tests of the Triton kernels share."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from kw_mm.ops import triton_support

DEVICE = 'cpu' if triton_support._is_interpreted() else 'cuda'

GUARD = 64  # elements around every buffer; keeps it aligned


def mend_bfloat16() -> None:
    """Makes the interpreter round to bfloat16 and multiply it, as GPUs do.

    It keeps bfloat16 as 16 bits. Triton 3.7 cuts float32 off there, converts float64 as if the
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


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device=DEVICE, requires_grad=True)


def gradients(out: Tensor, weights: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    # A loop over no samples has no graph; the added zero lends it one.
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


def check_precision(function: Callable, twin: Callable, leaves: Sequence[Tensor]) -> None:
    """Both in the leaves' dtype, or autocast's, against float64: at most twice torch's error."""
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = twin(*exact_leaves)
    weights = torch.randn(exact.shape, device=DEVICE).half()
    results = []
    for f, inputs in ((function, leaves), (twin, leaves), (twin, exact_leaves)):
        out = f(*inputs)
        results.append([out, *gradients(out, weights, inputs)])
    for i, (ours, torchs, wanted) in enumerate(zip(*results)):
        assert ours.dtype == torchs.dtype
        errors = [(t.double() - wanted).abs().max().item() for t in (ours, torchs)]
        assert errors[0] <= 2 * errors[1], (i, errors)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch):
    """Every ``torch.empty`` is NaN, with NaN around it that must still be there in the end."""
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
