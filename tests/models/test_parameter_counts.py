"""Parameters of every row of the paper's ImageNet table (method, section 7), heads included."""
import pytest
import torch
from torch import nn

from kw_mm import KWConvNeXt, KWLinear, KWMobileNetV2, KWResNet

CLASSES = 1000
HALF_PLANES = dict(cell_inplane_ratio=1 / 2, cell_outplane_ratio=1 / 2)


def resnet(depth, **kwargs):
    backbone = KWResNet(depth, **kwargs)
    return [backbone, nn.Linear(backbone.feat_dim, CLASSES)]


def convnext(**kwargs):
    backbone = KWConvNeXt('tiny', **kwargs)
    for i in range(3):  # a classifier has one norm, a detector one for each output
        delattr(backbone, f'norm{i}')
    return [backbone, nn.Linear(768, CLASSES)]


def mobilenet(width, **kwargs):
    return [KWMobileNetV2(width, **kwargs), nn.Linear(1280, CLASSES)]


def half_mobilenet(width):
    """The 1/2x model, whose classifier is dynamic too."""
    ratios = dict(cell_num_ratio=(1, 1, 1, 1, 1, 1, .5, 1, .5),
                  cell_inplane_ratio=(1, 1, 1, 1, 1, 1, .5, 1, .5),
                  cell_outplane_ratio=(1, 1, 1, 1, 1, 1, .5, 1, .5))
    backbone = KWMobileNetV2(width, share_pointwise=False,
                             static_pointwise_stages=(1, 2, 3, 4, 5),
                             kw_cfg=dict(reduction=1 / 32, **ratios))
    return [backbone, KWLinear(1280, CLASSES, kw_cfg=dict(
        cell_num_ratio=.5, cell_inplane_ratio=.025, reduction=1 / 32))]


def budget(ratio, **kwargs):
    return dict(kw_cfg=dict(cell_num_ratio=ratio, **kwargs))


@pytest.mark.parametrize('build, millions', [
    (lambda: resnet(18, static=True), '11.69'),
    # The table says 4.08M, but the authors' code builds this.
    (lambda: resnet(18, **budget(1 / 4, **HALF_PLANES)), '4.03'),
    (lambda: resnet(18, **budget(1 / 2, **HALF_PLANES)), '7.43'),
    (lambda: resnet(18, **budget(1)), '11.93'),
    (lambda: resnet(18, **budget(2)), '23.24'),
    (lambda: resnet(18, **budget(4)), '45.86'),
    (lambda: resnet(50, static=True), '25.56'),
    (lambda: resnet(50, **budget(1 / 2, **HALF_PLANES, nonlocal_basis_ratio=1 / 16)), '17.64'),
    (lambda: resnet(50, **budget(1)), '28.05'),
    (lambda: resnet(50, **budget(4)), '102.02'),
    (lambda: convnext(static=True), '28.59'),
    (lambda: convnext(**budget(1)), '39.37'),
    (lambda: mobilenet(1.0, static=True), '3.50'),
    (lambda: half_mobilenet(1.0), '2.65'),
    (lambda: mobilenet(1.0, **budget(1)), '5.17'),
    (lambda: mobilenet(1.0, share_pointwise=False, **budget(4)), '11.38'),
    (lambda: mobilenet(0.5, static=True), '1.97'),
    (lambda: half_mobilenet(0.5), '1.47'),
    (lambda: mobilenet(0.5, **budget(1)), '2.85'),
    (lambda: mobilenet(0.5, share_pointwise=False, **budget(4)), '4.65'),
])
def test_published_parameter_counts(build, millions):
    with torch.device('meta'):
        modules = build()
    count = sum(p.numel() for module in modules for p in module.parameters())
    assert f'{count / 1e6:.2f}' == millions
    backbone = modules[0]
    outside = sum(p.numel() for n, p in backbone.named_parameters()
                  if 'attention' not in n and 'warehouse' not in n and not (
                      n.endswith('.bias') and n[:-5] in backbone.plan.layers))
    assert outside + backbone.plan.num_parameters == sum(
        p.numel() for p in backbone.parameters())
