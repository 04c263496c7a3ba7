"""Gradients in single precision, on the path that users run, against double precision: of every
subset of what a layer depends on, and of outputs and kernels of any strides."""
import copy
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from kw_mm import KWConv1d, KWConv2d, KWConv3d

CLASSES = {1: KWConv1d, 2: KWConv2d, 3: KWConv3d}
# In a layer: its input, the cells, the first and last weights of the attention.
NAMES = ('x', 'cells', 'fc1', 'fc2')
SUBSETS = [names for size in range(1, len(NAMES) + 1)
           for names in itertools.combinations(NAMES, size)]


@st.composite
def layers(draw):
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2]))
    # Narrow cells use torch's products, wide ones the compiled; the order depends on their number.
    channels = draw(st.sampled_from([(4, 6), (16, 32), (48, 16), (32, 32)]))
    kernel_size = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=dims, max_size=dims))
    layer = CLASSES[dims](
        *channels, tuple(kernel_size), draw(st.integers(1, 2)), draw(st.integers(0, 1)),
        groups=groups, bias=draw(st.booleans()), kw_cfg=dict(
            cell_num_ratio=draw(st.sampled_from([0.5, 1, 4])),
            cell_inplane_ratio=draw(st.sampled_from([0.5, 1])),
            attn_norm=draw(st.sampled_from(['LN', 'BN1d'])),
            spatial_partition=draw(st.booleans())))
    return layer.train(draw(st.booleans()))


def behind_nan(tensor):
    """The same numbers in memory that is NaN before and behind them."""
    space = torch.full((tensor.numel() + 64,), math.nan, dtype=tensor.dtype)
    return space[32:-32].view(tensor.shape).copy_(tensor)


def in_strides(kind, shape, dtype):
    """Random numbers in a memory layout that gradients can have."""
    torch.manual_seed(2)
    if kind == 'expanded':
        return behind_nan(torch.randn((), dtype=torch.float64).to(dtype)).expand(shape)
    numbers = torch.randn(shape, dtype=torch.float64).to(dtype)
    if kind == 'strided':
        space = torch.full([2 * size for size in shape], math.nan, dtype=dtype)
        return space[tuple(slice(None, None, 2) for _ in shape)].copy_(numbers)
    if kind == 'transposed':
        order = [0, *range(len(shape) - 1, 0, -1)]
        return behind_nan(numbers.permute(order).contiguous()).permute(order)
    return behind_nan(numbers)


def gradients(layer, x, names, output, kind):
    sources = dict(x=x, cells=layer.cells, fc1=layer.attention.fc1.weight,
                   fc2=layer.attention.fc2.weight)
    y = getattr(layer, output)(x)
    # Not linear in the output, and in the given strides.
    return torch.autograd.grad(y, [sources[name] for name in names],
                               in_strides(kind, y.shape, y.dtype), allow_unused=False)


@settings(deadline=None, max_examples=150)
@given(layer=layers(), batch=st.integers(1, 4), names=st.sampled_from(SUBSETS),
       kind=st.sampled_from(['contiguous', 'expanded', 'strided', 'transposed']),
       output=st.sampled_from(['forward', 'kernel']), channels_last=st.booleans())
def test_every_subset_of_gradients(layer, batch, names, kind, output, channels_last):
    # Without gradients of the cells, those of the mixing weights were computed from rows that were
    # not contiguous: with an error as large as themselves, and for an expanded one from memory
    # beyond it.
    assume(not channels_last or layer.num_dims == 2)
    # Batch norm turns any two samples into plus and minus one, so the exact gradient is 0 and only
    # rounding errors remain.
    assume(batch != 2 or not layer.training or isinstance(layer.attention.norm1, nn.LayerNorm))
    torch.manual_seed(1)
    with torch.no_grad():
        # A signal that the mean does not remove.
        x = torch.randn(batch, layer.in_channels, *(5,) * layer.num_dims) + torch.randn(
            batch, layer.in_channels, *(1,) * layer.num_dims)
        nn.init.normal_(layer.attention.fc1.weight, 0, 0.5)
        twin = copy.deepcopy(layer).double()
        for parameter in layer.parameters():
            parameter.data = behind_nan(parameter.data)
    exact = gradients(twin, x.double().requires_grad_(), names, output, kind)
    x = behind_nan(x)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    found = gradients(layer, x.requires_grad_(), names, output, kind)
    for name, actual, expected in zip(names, found, exact):
        assert actual.shape == expected.shape and actual.isfinite().all()
        scale = max(expected.norm().item(), 1e-3)
        assert (actual.double() - expected).norm().item() < 1e-4 * scale, name


def test_the_gradient_of_an_image_alone():
    # As for saliency maps and adversarial examples.
    torch.manual_seed(0)
    layer = KWConv2d(64, 64, 3, padding=1)
    twin = copy.deepcopy(layer).double()
    x = torch.randn(1, 64, 14, 14, requires_grad=True)
    exact, = torch.autograd.grad(twin(double := x.detach().double().requires_grad_()).sin().sum(),
                                 double)
    found, = torch.autograd.grad(layer(x).sin().sum(), x)
    assert (found - exact).norm() < 1e-5 * exact.norm()


@pytest.mark.parametrize('frozen', ['cells', 'attention', 'nothing'])
def test_backward_with_inputs_named(frozen):
    torch.manual_seed(0)
    layer = KWConv2d(32, 32, 3, padding=1, kw_cfg=dict(cell_num_ratio=4))
    twin = copy.deepcopy(layer).double()
    for module in (layer, twin):
        if frozen == 'cells':
            module.cells.requires_grad_(False)
        if frozen == 'attention':
            module.attention.requires_grad_(False)
    x = torch.randn(2, 32, 7, 7)
    wanted = [name for name, p in layer.named_parameters() if p.requires_grad]
    for name in wanted:
        for module, image in ((layer, x), (twin, x.double())):
            module.zero_grad()
            module(image).square().sum().backward(inputs=[module.get_parameter(name)])
        exact = twin.get_parameter(name).grad
        assert (layer.get_parameter(name).grad - exact).norm() < 1e-4 * exact.norm() + 1e-6
