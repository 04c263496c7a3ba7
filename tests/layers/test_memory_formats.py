"""A layer's output has the memory format of its input: contiguous or channels-last.

If dimensions of length 1 of a kernel had unusual strides, convolving a single image returned a
channels-last map, and operators that treat memory as contiguous read wrong numbers.
"""
import itertools
import math

import pytest
import torch
from optimised import optimised_with, randomise
from torch import nn

from kw_mm import KWConv1d, KWConv2d, KWConv3d, KWLinear, KWResNet
from kw_mm.ops import convolution, convolution_paths, dynamic_conv, use_cpu_products

CONVS = {1: KWConv1d, 2: KWConv2d, 3: KWConv3d}

# Pointwise, and nearly so; with one input or output channel; depthwise, grouped; longer in one
# dimension only; dilated, strided, padded by name or with other values than zeros.
GEOMETRIES = [
    dict(kernel_size=1), dict(kernel_size=1, padding=1), dict(kernel_size=1, stride=2),
    dict(kernel_size=3, padding=1), dict(kernel_size=3, padding=1, stride=2),
    dict(kernel_size=3, padding=1, out_channels=1), dict(kernel_size=1, out_channels=1),
    dict(kernel_size=3, padding=1, groups=4), dict(kernel_size=3, padding=2, dilation=2, groups=2),
    dict(kernel_size=1, groups=4), dict(kernel_size=3, padding='same', bias=False),
    dict(kernel_size=3, padding=1, padding_mode='replicate'), dict(kernel_size=2)]


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def lies_as(y, layout):
    """Strides as in a new tensor, also in dimensions of length 1, which is_contiguous ignores."""
    if layout is contiguous:
        return y.stride() == torch.empty(y.shape).stride()
    return y.movedim(1, -1).is_contiguous()


def layers(dims):
    for number, kwargs in enumerate(GEOMETRIES):
        torch.manual_seed(number)
        kwargs = {**kwargs, 'out_channels': kwargs.get('out_channels', 8)}
        if dims > 1 and kwargs['kernel_size'] == 2:
            kwargs['kernel_size'] = (1, *(3,) * (dims - 1))
        yield CONVS[dims](4, **kwargs)


# Numbers of positions with which each path is taken: im2col, sample by sample, grouped.
SIZES = {1: [(6,), (1100,)], 2: [(1, 5), (7, 6), (11, 12), (34, 33)], 3: [(3, 4, 3), (10, 9, 13)]}


@pytest.mark.parametrize('layout', [contiguous, channels_last])
@pytest.mark.parametrize('dims', [1, 2, 3])
def test_every_geometry_batch_and_size(dims, layout):
    for layer, size, batch, train in itertools.product(
            layers(dims), SIZES[dims], (0, 1, 2, 3), (False, True)):
        layer.train(train)
        x = torch.randn(batch, 4, *size)
        with torch.set_grad_enabled(train):
            y = layer(layout(x))
        assert lies_as(y, layout), (layer, x.shape, train, y.stride())


@pytest.mark.parametrize('layout', [contiguous, channels_last])
@pytest.mark.parametrize('kind', ['bases', 'cells'])
@pytest.mark.parametrize('compiled', [True, False])
def test_optimised_layers(kind, layout, compiled, monkeypatch):
    model = randomise(nn.Sequential(*layers(2)))
    twin, _ = optimised_with(kind, model)
    use_cpu_products(compiled)
    try:
        for layer, size, batch in itertools.product(twin, SIZES[2], (1, 2)):
            with torch.no_grad():
                y = layer(layout(torch.randn(batch, 4, *size)))
            assert lies_as(y, layout), (layer, size, batch, y.stride())
    finally:
        use_cpu_products(True)


@pytest.mark.parametrize('optimise', [False, True])
def test_linear_layers(optimise):
    model = randomise(nn.Sequential(KWLinear(4, 6), KWLinear(4, 1), KWLinear(4, 6, bias=False)))
    if optimise:
        model, _ = optimised_with('cells', model)
    for layer, shape in itertools.product(model, ((0, 4), (1, 4), (3, 4), (1, 5, 4), (2, 5, 4),
                                                  (2, 1, 4), (2, 3, 5, 4), (2, 1100, 4))):
        x = torch.randn(shape)
        y = layer(x)
        assert lies_as(y, contiguous), (layer, shape, y.stride())
        if x.dim() == 3:
            turned = layer(x.transpose(0, 1).contiguous().transpose(0, 1))
            assert lies_as(turned, contiguous)
            torch.testing.assert_close(turned, y)


PATHS = ['one', 'pointwise', 'im2col', 'rows', 'sample_by_sample', 'grouped']


@pytest.mark.parametrize('layout', [contiguous, channels_last])
@pytest.mark.parametrize('path', PATHS)
def test_kernels_of_any_strides_without_copies(path, layout, monkeypatch):
    # The paths themselves return the right format, because copying a map costs as much as a small
    # convolution. Kernels are contiguous, position before input, one output channel at a time, or
    # with unusual strides in dimensions of length 1.
    monkeypatch.setattr(convolution, 'choose_path', lambda *_: getattr(convolution_paths, path))
    batch = 1 if path == 'one' else 3
    for groups, size in itertools.product((1, 4), ((1, 1), (3, 3), (1, 3))):
        if (path == 'pointwise' and size != (1, 1)) or (
                groups > 1 and path in ('pointwise', 'im2col', 'rows')):
            continue
        torch.manual_seed(0)
        x = layout(torch.randn(batch, 4, 7, 9))
        kernel = torch.randn(batch, 8, 4 // groups, *size)
        padding = (size[0] // 2, size[1] // 2)
        expected = torch.cat([torch.conv2d(x[i:i + 1], kernel[i], None, 1, padding, 1, groups)
                              for i in range(batch)])
        for strided in (kernel, kernel.movedim(2, -1).contiguous().movedim(-1, 2),
                        kernel.transpose(0, 1).contiguous().transpose(0, 1), odd(kernel)):
            y = getattr(convolution_paths, path)(x, strided, None, layout is channels_last, (1, 1),
                                           padding, (1, 1), groups)
            torch.testing.assert_close(y, expected)
            assert lies_as(y, layout if path != 'grouped' else contiguous)
            whole = dynamic_conv(x, strided, None, (1, 1), padding, (1, 1), groups)
            torch.testing.assert_close(whole, expected)
            assert lies_as(whole, layout)


def odd(kernel):
    """The same numbers; dimensions of length 1 have the stride of another one."""
    strides = [stride if size > 1 else max(kernel.stride(2), 2)
               for size, stride in zip(kernel.shape, kernel.stride())]
    assert math.prod(kernel.shape) == kernel.numel()
    return kernel.as_strided(kernel.shape, strides)


@pytest.mark.parametrize('static', [False, True])
@pytest.mark.parametrize('train', [False, True])
@pytest.mark.parametrize('build', [
    lambda **kwargs: KWResNet(50, base_channels=8, norm_eval=False, **kwargs),
    lambda **kwargs: KWResNet(18, base_channels=8, dilations=(1, 1, 2, 4), strides=(1, 2, 1, 1),
                              deep_stem=True, avg_down=True, **kwargs),
    lambda **kwargs: convnext(**kwargs), lambda **kwargs: convnext(output_stride=8, **kwargs),
    lambda **kwargs: mobilenet(**kwargs)], ids=['r50', 'r18-d8', 'convnext', 'convnext-os8',
                                                'mobilenet'])
def test_backbones(build, static, train):
    # ConvNeXt's norms return a permuted view, so its feature maps were channels-last for every
    # batch size, also in the static twin.
    torch.manual_seed(0)
    net = build(static=static).train(train)
    for layout, batch in itertools.product((contiguous, channels_last), (1, 2)):
        x = layout(torch.randn(batch, 3, 64, 96))
        with torch.set_grad_enabled(train):
            outputs = net(x)
        assert len(outputs) == 4
        for y in outputs:
            # The maps of channels-last images may have either format.
            assert lies_as(y, layout) or (layout is channels_last and lies_as(y, contiguous))


def convnext(**kwargs):
    from kw_mm import KWConvNeXt
    return KWConvNeXt(dict(depths=(1, 1, 1, 1), channels=(8, 16, 16, 24)), **kwargs)


def mobilenet(**kwargs):
    from kw_mm import KWMobileNetV2
    return KWMobileNetV2(0.25, **kwargs)
