"""Compares a fast function with its reference, for random geometries."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def geometries(draw: st.DrawFn) -> dict:
    """A layer's sizes: 1 to 3 dimensions, any groups, stride, dilation, padding and batch."""
    dims = draw(st.integers(1, 3))
    sizes = st.integers(1, 3)
    groups = draw(st.integers(1, 3))
    cell = (draw(sizes), draw(sizes))
    partition = draw(st.booleans())
    kernel_size = tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims)))
    dilation = tuple(draw(st.lists(st.integers(1, 2), min_size=dims, max_size=dims)))
    padding = tuple(draw(st.lists(st.integers(0, 2), min_size=dims, max_size=dims)))
    positions = math.prod(kernel_size) if partition else 1
    grid = (positions, groups * draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    least = [max(d * (k - 1) + 1 - 2 * p, 1) for d, k, p in zip(dilation, kernel_size, padding)]
    return dict(
        batch=draw(st.integers(0, 5)), groups=groups, grid=grid, kernel_size=kernel_size,
        cell_shape=(*cell, *((1,) * dims if partition else kernel_size)),
        num_cells=draw(st.integers(1, 6)), dilation=dilation, padding=padding,
        stride=tuple(draw(st.lists(st.integers(1, 3), min_size=dims, max_size=dims))),
        size=tuple(lower + draw(st.integers(0, 4)) for lower in least),
        bias=draw(st.booleans()), tau=draw(st.sampled_from([0., 0.37, 1.])))


def leaf(*shape: int) -> Tensor:
    """Random numbers in float64 that require a gradient."""
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def check(function: Callable[..., Tensor], twin: Callable[..., Tensor],
          inputs: Sequence[Tensor | None], *rest: object) -> None:
    """Compares outputs, and gradients of a random linear form, for all inputs that have them."""
    leaves = [t for t in inputs if t is not None and t.requires_grad]
    outputs = [f(*inputs, *rest) for f in (function, twin)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(outputs[0])
    # A loop over no samples has no graph. Adding zero gives it one.
    fast, slow = (torch.autograd.grad((out * weights).sum() + sum(t.sum() * 0 for t in leaves),
                                      leaves) for out in outputs)
    for actual, expected in zip(fast, slow):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
