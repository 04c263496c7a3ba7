"""Convolutions of slices and matrix products against the reference, in every geometry."""
import itertools

import pytest
import torch
import torch.nn.functional as F

from kw_mm.export.products import pad, rearrange, slice_conv
from kw_mm.ops import reference


@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('kwargs', [
    dict(), dict(kernel_size=1), dict(stride=2), dict(dilation=2), dict(stride=3, dilation=2),
    dict(kernel_size=1, stride=2), dict(groups=2), dict(groups=4), dict(groups=4, out=8),
    dict(groups=4, stride=2, dilation=2), dict(out=6, bias=False)])
def test_convolution(dims, kwargs):
    options = dict(dict(kernel_size=3, stride=1, dilation=1, groups=1, out=4, bias=True), **kwargs)
    size, stride, dilation = ([options[name]] * dims for name in (
        'kernel_size', 'stride', 'dilation'))
    groups, out = options['groups'], options['out']
    bias = torch.randn(out).double() if options['bias'] else None
    for batch, length in itertools.product((1, 3), (7, 8)):
        x = torch.randn(batch, 4, *(length + i for i in range(dims))).double()
        kernel = torch.randn(batch, out, 4 // groups, *size).double()
        expected = reference.dynamic_conv(x, kernel, bias, stride, [0] * dims, dilation, groups)
        found = slice_conv(x, kernel.flatten(3).transpose(2, 3), bias, size, stride, dilation,
                           groups)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize('dims', [1, 2, 3])
@pytest.mark.parametrize('mode, name', [('zeros', 'constant'), ('reflect', 'reflect'),
                                        ('replicate', 'replicate'), ('circular', 'circular')])
def test_padding(dims, mode, name):
    x = torch.randn(2, 3, *(5, 6, 4)[:dims])
    for pads in ([(0, 0)] * dims, [(2, 2)] * dims, [(1, 2), (0, 3), (2, 0)][:dims]):
        sides = [side for pair in reversed(pads) for side in pair]
        torch.testing.assert_close(pad(x, pads, mode), F.pad(x, sides, name), rtol=0, atol=0)


@pytest.mark.parametrize('sizes', [
    (2, 3, 4, 5), (1, 3, 1, 5), (2, 1, 1, 5), (1, 1, 1, 5), (2, 3, 1, 1)])
def test_permutations(sizes):
    x = torch.randn(2, *sizes)
    for order in itertools.permutations(range(1, 5)):
        found = rearrange(x.flatten(1), sizes, (0, *order))
        assert torch.equal(found, x.permute(0, *order).flatten(1))
