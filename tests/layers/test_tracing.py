"""Graphs of KW layers: torch.fx, torch.jit.trace and torch.export, with sizes that change.

Control flow that depends on shapes was an error in torch.fx, and made exported and traced graphs
wrong or invalid for other sizes than the example's.
"""
import copy

import pytest
import torch
from optimised import optimised, outputs, randomise
from torch import nn

import kw_mm
from kw_mm import (
    KWConv1d,
    KWConv2d,
    KWConv3d,
    KWLinear,
    convert_to_kw_,
)
from kw_mm.layers.conv import convolve


def converted():
    net = nn.Sequential(nn.Conv2d(3, 64, 3, 4), nn.BatchNorm2d(64), nn.ReLU(),
                        nn.Conv2d(64, 64, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(64, 4))
    convert_to_kw_(net, dict(cell_num_ratio=2), linear=True)
    return net


NETS = {
    'resnet': lambda: kw_mm.KWResNet(18, base_channels=8, norm_eval=False),
    'convnext': lambda: kw_mm.KWConvNeXt(dict(depths=(1, 1, 1, 1), channels=(8, 8, 16, 16)),
                                   output_stride=16),
    'mobilenet': lambda: kw_mm.KWMobileNetV2(0.25),
    'converted': converted,
    'private': lambda: nn.Sequential(KWConv2d(3, 8, 3, padding='same', padding_mode='reflect'),
                                     nn.BatchNorm2d(8), KWConv2d(8, 4, 1)),
}


@pytest.mark.parametrize('mode', ['train', 'eval', 'optimised'])
@pytest.mark.parametrize('name', NETS)
def test_fx(name, mode):
    net = randomise(NETS[name]())
    if mode == 'optimised':
        net, _ = optimised(net)
    net.train(mode == 'train')
    graph = torch.fx.symbolic_trace(net)
    layers = [node.target for node in graph.graph.nodes if node.op == 'call_module']
    kw_layers = [path for path, module in net.named_modules() if hasattr(module, 'plan')
                 and hasattr(module, 'in_channels')]
    assert all(path in layers or path.removesuffix('.conv') in layers for path in kw_layers)
    # Cells of shared warehouses belong to no layer, but are in the graph.
    assert {key for key in net.state_dict() if 'warehouse' in key} <= set(graph.state_dict())
    for size in ((2, 3, 64, 64), (1, 3, 96, 64), (3, 3, 64, 96)):
        x = torch.randn(size)
        # Copies, because in training a run changes the statistics for the next one.
        pair = copy.deepcopy(net), copy.deepcopy(graph)
        for actual, expected in zip(*(outputs(module, x, grad=True) for module in pair[::-1])):
            torch.testing.assert_close(actual, expected)
    if mode != 'optimised':
        expected, actual = (gradients(module, x) for module in pair)
        assert set(actual) == set(expected)
        for key, grad in expected.items():
            torch.testing.assert_close(actual[key], grad, msg=key)


def gradients(module, x):
    module.zero_grad()
    sum(y.square().sum() for y in outputs(module, x, grad=True)).backward()
    return {key: p.grad for key, p in module.named_parameters() if p.grad is not None}


def test_fx_of_a_part_whose_cells_are_beside_it():
    net = NETS['resnet']().eval()
    x = torch.randn(2, 8, 16, 16)
    graph = torch.fx.symbolic_trace(net.layer1)
    torch.testing.assert_close(graph(x), net.layer1(x))


@pytest.mark.parametrize('layer', [KWConv2d(3, 4, 3), KWLinear(3, 4)])
def test_fx_of_a_layer_by_itself_is_told(layer):
    with pytest.raises(ValueError, match=f'not a {type(layer).__name__} by itself'):
        torch.fx.symbolic_trace(layer)


def test_mmengine_folds_norms_of_static_layers_alone():
    from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
    net = randomise(nn.Sequential(NETS['resnet']()))
    x = torch.randn(2, 3, 64, 64)
    expected = outputs(net, x)
    turn_on_efficient_conv_bn_eval(net, '0')
    for actual, wanted in zip(outputs(net, x), expected):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


class Layer(nn.Module):
    """A KW layer with the simplest kernels that depend on the image."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        self.shape = conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size
        self.weight = nn.Parameter(torch.randn(self.shape))
        nn.init.normal_(conv.bias)

    def kernel(self, x):
        return x.flatten(1).mean(1).view(-1, *(1,) * len(self.shape)) * self.weight

    def forward(self, x):
        return convolve(self.conv, x, self.kernel)


CONVS = {
    'pointwise': lambda: KWConv2d(4, 8, 1), 'strided': lambda: KWConv2d(4, 8, 1, stride=2),
    'padded': lambda: KWConv2d(4, 8, 3, padding=1, stride=2), '1d': lambda: KWConv1d(4, 6, 3),
    'depthwise': lambda: KWConv2d(4, 4, 3, padding=1, groups=4),
    'same': lambda: KWConv2d(4, 8, (2, 3), padding='same', dilation=2),
    'valid': lambda: KWConv2d(4, 8, 3, padding='valid'),
    'reflect': lambda: KWConv2d(4, 8, 3, padding='same', padding_mode='reflect'),
    '3d': lambda: KWConv3d(4, 4, 3, padding=1, groups=2)}


@pytest.mark.parametrize('channels_last', [False, True])
@pytest.mark.parametrize('how', [
    pytest.param('export', marks=pytest.mark.skipif(
        not hasattr(getattr(torch.export, 'Dim', None), 'DYNAMIC'),
        reason='torch below 2.6 does not find out which sizes may change')),
    'trace', 'trace without gradients'])
@pytest.mark.parametrize('name', CONVS)
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
def test_other_sizes_than_the_example_s(name, how, channels_last):
    torch.manual_seed(0)
    layer = Layer(CONVS[name]())
    dims = layer.conv.num_dims

    def maps(batch, *size):
        x = torch.randn(batch, 4, *size[:dims])
        return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x

    # Few positions and many, for which different paths are chosen.
    example = maps(2, 7, 8, 9)
    with torch.set_grad_enabled(how != 'trace without gradients'):
        if how == 'export':
            sizes = {dim: torch.export.Dim.DYNAMIC for dim in (0, *range(2, dims + 2))}
            graph = torch.export.export(layer, (example,), dynamic_shapes=(sizes,)).module()
        else:
            graph = torch.jit.trace(layer, example, check_inputs=[(maps(3, 8, 7, 9),)])
        for x in (example, maps(1, 6, 9, 7), maps(3, 40, 35, 6)):
            torch.testing.assert_close(graph(x), layer(x))
