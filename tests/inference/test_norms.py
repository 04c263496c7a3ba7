"""Batch norms are folded only if it is certain which convolution they follow."""
import copy
import importlib

import pytest
import torch
from optimised import error, optimised, outputs, randomise
from torch import nn
from torch.nn.utils import spectral_norm

import kw_mm
from kw_mm import KWConv2d


def check(model, num_folded):
    """Outputs stay the same, and so many norms are gone."""
    model = randomise(model).double()
    twin, report = optimised(model)
    x = torch.randn(2, 4, 8, 7).double()
    assert error(outputs(twin, x), outputs(model, x)) < 1e-10
    assert report.num_folded == num_folded
    before, after = (sum('Norm' in type(m).__name__ and 'attention' not in name
                         for name, m in net.named_modules()) for net in (model, twin))
    assert before - after == num_folded
    return twin, report


def kw(channels=4, **kwargs):
    return KWConv2d(4, channels, 3, padding=1, **kwargs)


@pytest.mark.parametrize('package', ['torch.nn', 'mmengine.model'])
def test_neighbours_in_a_sequence(package):
    sequential = importlib.import_module(package).Sequential
    twin, report = check(sequential(
        kw(8), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.SyncBatchNorm(4),
        nn.BatchNorm2d(4)), 2)
    assert [type(m).__name__ for m in twin] == [
        'OptimizedConv', 'Identity', 'ReLU', 'Conv2d', 'Identity', 'BatchNorm2d']
    assert [layer.folded for layer in report.layers] == [True]


@pytest.mark.parametrize('norm', [
    nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    nn.BatchNorm2d(4, track_running_stats=False), nn.LayerNorm((4, 8, 7))])
def test_norms_of_the_image_stay(norm):
    check(nn.Sequential(kw(), norm, nn.Conv2d(4, 4, 1), copy.deepcopy(norm)), 0)


class NormAct(nn.BatchNorm2d):
    """One module for norm and activation, as in timm."""

    def forward(self, x):
        return super().forward(x).relu()


def test_norms_that_do_more_than_normalise_stay():
    # The activation was lost with the norm.
    check(nn.Sequential(kw(), NormAct(4), nn.Conv2d(4, 4, 1), NormAct(4)), 0)


def test_norms_without_weights_are_folded():
    check(nn.Sequential(kw(), nn.BatchNorm2d(4, affine=False)), 1)


def test_a_norm_before_a_convolution_stays():
    check(nn.Sequential(nn.BatchNorm2d(4), kw(), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
          0)


def test_a_norm_used_twice_stays():
    norm = nn.BatchNorm2d(4)
    check(nn.Sequential(kw(), norm, kw(), norm), 0)


def test_a_convolution_used_twice_is_not_scaled():
    # With the first norm folded into it, it would be wrong at its second place.
    conv, static = kw(), nn.Conv2d(4, 4, 1)
    twin, report = check(nn.Sequential(
        conv, nn.BatchNorm2d(4), static, nn.BatchNorm2d(4), nn.ReLU(), conv, static), 0)
    assert twin[0] is twin[5] and type(twin[0]).__name__ == 'OptimizedConv'
    assert len(report.layers) == 1


class Recorded(nn.Module):
    """Keeps modules in a plain list too, and calls them from there."""

    def __init__(self, *modules, hidden=()):
        super().__init__()
        self.body = nn.Sequential(*modules)
        self.hidden = [dict(module=self.body[i]) for i in hidden]

    def forward(self, x):
        for entry in self.hidden:
            x = entry['module'](x)
        return self.body(x)


@pytest.mark.parametrize('hidden, num_folded, skipped', [
    ((), 2, ()), ((0,), 1, ('body.0',)), ((1,), 1, ()), ((2,), 1, ()), ((3,), 1, ()),
    ((0, 1, 2, 3), 0, ('body.0',))])
def test_what_is_also_held_in_a_list_stays(hidden, num_folded, skipped):
    _, report = check(Recorded(kw(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4),
                               kw(), hidden=hidden), num_folded)
    assert report.skipped == skipped
    assert [layer.name for layer in report.layers] == [
        name for name in ('body.0', 'body.4') if name not in skipped]
    assert ('body.0' in str(report).splitlines()[-1]) == bool(skipped)


class Residual(nn.Sequential):
    """Derives from nn.Sequential, but is not a chain."""

    def forward(self, x):
        for layer in self:
            x = x + layer(x)
        return x


def test_a_sequence_with_a_forward_of_its_own():
    # The norm of a sum was folded into the last summand.
    check(Residual(kw(), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), 0)


def test_a_conv_module_with_a_forward_of_its_own():
    from mmcv.cnn import ConvModule

    class PreNorm(ConvModule):
        def forward(self, x):
            return self.conv(self.norm(x))

    check(PreNorm(4, 4, 3, norm_cfg=dict(type='BN'), conv_cfg=dict(type='KWConv2d')), 0)


def test_a_convolution_whose_weight_is_made_by_a_hook():
    from mmcv.cnn import ConvModule
    # Spectral norm computes the weight in every call, which lost what was folded into it.
    check(nn.Sequential(ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), with_spectral_norm=True),
                        spectral_norm(nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4), kw()), 0)


def test_a_conv_module_that_folds_by_itself():
    from mmcv.cnn import ConvModule
    # It reads the weights of its norm in every call, which an identity does not have.
    check(nn.Sequential(ConvModule(4, 4, 3, norm_cfg=dict(type='BN'), efficient_conv_bn_eval=True),
                        kw()), 0)


@pytest.mark.parametrize('hooked', ['0', '0.attention', '0.attention.fc1', '1', '3'])
def test_hooks_are_called_as_before(hooked):
    model = randomise(nn.Sequential(kw(), nn.BatchNorm2d(4), kw(), nn.BatchNorm2d(4))).double()
    seen = []
    model.get_submodule(hooked).register_forward_hook(lambda module, args, y: seen.append(y))
    twin, report = optimised(model)
    x = torch.randn(2, 4, 8, 7).double()
    assert error(outputs(twin, x), outputs(model, x)) < 1e-10
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1], rtol=1e-10, atol=1e-12)
    assert report.skipped == (('0',) if hooked.startswith('0') else ())
    assert report.num_folded == 1


def test_a_converted_module():
    model = kw_mm.KWConverted(dict(
        type='mmdet.FPN', in_channels=[16, 32], out_channels=16, num_outs=2,
        norm_cfg=dict(type='BN'), act_cfg=None))
    model = randomise(model).double()
    twin, report = optimised(model)
    assert report.num_folded == 4
    assert [layer.folded for layer in report.layers] == [True, True]  # the others are static
    x = [torch.randn(2, c, s, s).double() for c, s in ((16, 8), (32, 4))]
    with torch.no_grad():
        assert error(twin(x), model(x)) < 1e-10


def test_a_static_neck_is_folded_too():
    from mmdet.registry import MODELS
    neck = MODELS.build(dict(type='FPN', in_channels=[4], out_channels=8, num_outs=1,
                             norm_cfg=dict(type='BN'), act_cfg=None))
    model = randomise(nn.ModuleDict(dict(backbone=nn.Sequential(kw()), neck=neck))).double()
    twin, report = optimised(model)
    assert report.num_folded == 2
    x = torch.randn(2, 4, 8, 8).double()
    with torch.no_grad():
        assert error(*(net['neck']([net['backbone'](x)]) for net in (twin, model))) < 1e-10
