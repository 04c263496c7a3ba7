"""StaticPretrained: KW backbones from checkpoints of static ones."""
import json
import logging
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from mmdet.models.backbones import MobileNetV2, ResNet
from mmengine.model import BaseModule, PretrainedInit, Sequential
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmseg.models.backbones import ResNetV1c
from torch import nn

from kw_mm import KWConvNeXt, KWMobileNetV2, KWResNet, StaticPretrained, set_temperature
from kw_mm.convert.keys import rename_keys, reverse
from kw_mm.convert.state_dict import static_shapes
from kw_mm.layers import Attention
from kw_mm.models import checkpoint_names, static_weights
from kw_mm.models.checkpoint_names import DownloadFailed, locate_checkpoint

CONVNEXT = dict(arch=dict(depths=(1, 1), channels=(16, 32)), layer_scale_init_value=1.0,
                out_indices=(0, 1))
BACKBONES = {KWResNet: dict(depth=50, base_channels=8), KWConvNeXt: CONVNEXT,
             KWMobileNetV2: dict(widen_factor=0.25)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def static_twin(backbone):
    static = backbone(**BACKBONES[backbone], static=True).eval()
    for parameter in static.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    for norm in static.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean, 0, 0.2)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return static


def started(backbone, file, prefix=None, **kwargs):
    model = backbone(**{**BACKBONES[backbone], **kwargs}, init_cfg=dict(
        type='StaticPretrained', checkpoint=str(file), prefix=prefix))
    model.init_weights()
    model.eval()
    return model


def same(model, static):
    x = torch.randn(2, 3, 64, 64)
    return all((a - b).norm() < 1e-3 * b.norm()
               for a, b in zip(model(x), static(x), strict=True))


@pytest.mark.parametrize('backbone', BACKBONES)
@pytest.mark.parametrize('wrap', [
    lambda state: state,
    lambda state: dict(model=state, epoch=3),
    lambda state: dict(state_dict={f'backbone.{k}': v for k, v in state.items()}
                       | {'neck.conv.weight': torch.zeros(1)}),
    lambda state: dict(state_dict={f'module.backbone.{k}': v for k, v in state.items()}),
    lambda state: state | {'fc.weight': torch.zeros(1), 'head.fc.bias': torch.zeros(1),
                           'classifier.1.weight': torch.zeros(1)},
    lambda state: {k: v for k, v in state.items() if not k.endswith('num_batches_tracked')},
])
def test_it_starts_as_the_static_backbone(tmp_path, backbone, wrap):
    static = static_twin(backbone)
    torch.save(wrap(static.state_dict()), tmp_path / 'static.pth')
    assert same(started(backbone, tmp_path / 'static.pth'), static)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_it_is_exact_at_temperature_0_and_near_elsewhere(tmp_path, backbone):
    static = static_twin(backbone).double()
    torch.save(static.state_dict(), tmp_path / 'static.pth')
    model = backbone(**BACKBONES[backbone], init_cfg=dict(
        type='StaticPretrained', checkpoint=str(tmp_path / 'static.pth'))).double()
    model.init_weights()
    model.eval()
    x = torch.randn(2, 3, 64, 64).double()
    for tau, bound in ((0, 1e-9), (0.3, 2e-2), (1, 2e-2)):
        set_temperature(model, tau)
        for actual, expected in zip(model(x), static(x), strict=True):
            assert (actual - expected).norm() < bound * expected.norm()


@pytest.mark.parametrize('backbone', BACKBONES)
def test_within_two_steps_everything_has_moved(tmp_path, backbone):
    static = static_twin(backbone)
    torch.save(static.state_dict(), tmp_path / 'static.pth')
    model = started(backbone, tmp_path / 'static.pth').train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0)
    for _ in range(2):
        optimizer.zero_grad()
        sum(out.square().mean() for out in model(torch.randn(3, 3, 64, 64))).backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize('prefix', ['img_backbone', 'img_backbone.'])
def test_a_prefix_picks_the_backbone(tmp_path, prefix):
    static = static_twin(KWResNet)
    torch.save({f'{p}.{k}': v + (p != 'img_backbone') for k, v in static.state_dict().items()
                for p in ('backbone', 'img_backbone')}, tmp_path / 'static.pth')
    assert same(started(KWResNet, tmp_path / 'static.pth', prefix), static)
    with pytest.raises(ValueError, match=r"prefix must begin keys .*\['backbone', 'img_backbone'\]"
                                         ", got 'neck.'"):
        started(KWResNet, tmp_path / 'static.pth', 'neck')


def test_mmdets_resnet_in_part_and_dilated(tmp_path):
    kwargs = dict(depth=50, base_channels=8, deep_stem=True, avg_down=True)
    full = ResNet(**kwargs)
    torch.save(full.state_dict(), tmp_path / 'static.pth')
    part = dict(num_stages=3, out_indices=(0, 2), strides=(1, 2, 1), dilations=(1, 1, 2))
    static = ResNet(**kwargs, **part)
    static.load_state_dict({k: v for k, v in full.state_dict().items() if 'layer4' not in k})
    static.eval()
    assert same(started(KWResNet, tmp_path / 'static.pth', **kwargs, **part), static)


V1C = dict(depth=50, stem_channels=16, base_channels=8, strides=(1, 2, 1, 1),
           dilations=(1, 1, 2, 4), contract_dilation=True, norm_eval=False)


@pytest.mark.parametrize('budget', [1, 4])
def test_mmsegs_dilated_resnet(tmp_path, budget):
    static = ResNetV1c(**V1C)
    static.init_weights()
    static.eval()
    for norm in (m for m in static.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.running_mean, 0, 0.2)
    torch.save(dict(state_dict=static.state_dict()), tmp_path / 'v1c.pth')
    model = KWResNet(**V1C, deep_stem=True, kw_cfg=dict(cell_num_ratio=budget), init_cfg=dict(
        type='StaticPretrained', checkpoint=str(tmp_path / 'v1c.pth')))
    model.init_weights()
    with DefaultScope.overwrite_default_scope('mmseg'):
        converted = MODELS.build(dict(
            type='KWConverted', kw_cfg=dict(cell_num_ratio=budget), module=dict(
                type='ResNetV1c', **V1C, init_cfg=dict(
                    type='Pretrained', checkpoint=str(tmp_path / 'v1c.pth')))))
        converted.init_weights()
    x = torch.randn(1, 3, 64, 96)
    expected = static(x)
    for kw in (model, converted):
        kw.eval()
        for actual, wanted in zip(kw(x), expected, strict=True):
            assert (actual - wanted).norm() < 1e-5 * wanted.norm()


def torchvision_convnext(state):
    """The keys of torchvision.models.convnext, written by hand for depths (1, 1)."""
    names = {'downsample_layers.0.0': 'features.0.0', 'downsample_layers.0.1': 'features.0.1',
             'downsample_layers.1.0': 'features.2.0', 'downsample_layers.1.1': 'features.2.1'}
    for stage, feature in ((0, 1), (1, 3)):
        for ours, theirs in (('dwconv', 'block.0'), ('norm', 'block.2'), ('pwconv1', 'block.3'),
                             ('pwconv2', 'block.5'), ('gamma', 'layer_scale')):
            names[f'stages.{stage}.0.{ours}'] = f'features.{feature}.0.{theirs}'
    renamed = {'classifier.0.weight': torch.zeros(32), 'classifier.2.bias': torch.zeros(9)}
    for key, value in state.items():
        for ours, theirs in names.items():
            if key == ours or key.startswith(f'{ours}.'):
                renamed[theirs + key[len(ours):]] = (
                    value.flatten(1) if 'pwconv' in key and value.dim() == 4
                    else value.view(-1, 1, 1) if key.endswith('gamma') else value)
    return renamed


def official_convnext(state):
    """Linear pointwise layers, one-dimensional gamma, a last norm and no norms of outputs."""
    return {'norm.weight': torch.ones(32), 'head.weight': torch.ones(3, 32)} | {
        key: value.flatten(1) if 'pwconv' in key and value.dim() == 4 else value.flatten()
        if key.endswith('gamma') else value for key, value in state.items()
        if not key.startswith('norm')}


def mmpretrain_convnext(state):
    names = dict(dwconv='depthwise_conv', pwconv1='pointwise_conv1', pwconv2='pointwise_conv2')
    return {'.'.join(names.get(part, part) for part in key.split('.')): value
            for key, value in official_convnext(state).items() if key.startswith(('d', 's'))} | {
        key: value for key, value in state.items() if key.startswith('norm1')}


@pytest.mark.parametrize('layout', [torchvision_convnext, official_convnext, mmpretrain_convnext])
def test_layouts_of_convnext(tmp_path, layout):
    static = static_twin(KWConvNeXt)
    for name in ('norm0', 'norm1'):
        if layout is not mmpretrain_convnext or name == 'norm0':
            static.get_submodule(name).reset_parameters()  # not in the file
    torch.save(layout(static.state_dict()), tmp_path / 'static.pth')
    assert same(started(KWConvNeXt, tmp_path / 'static.pth'), static)


def test_layout_of_mmdets_mobilenet(tmp_path):
    theirs = MobileNetV2(widen_factor=0.25, out_indices=(1, 2, 4, 7))
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.running_mean)
    theirs.eval()
    torch.save(theirs.state_dict(), tmp_path / 'static.pth')
    # mmdet rounds its last layer to 320 channels at this width, torchvision has 1280.
    assert theirs.out_channel == 1280
    assert same(started(KWMobileNetV2, tmp_path / 'static.pth'), theirs)


@pytest.mark.parametrize('backbone', BACKBONES)
def test_layouts_can_be_turned_both_ways(backbone):
    model = backbone(**BACKBONES[backbone])
    shapes = static_shapes(model)
    for table in model.static_layouts().values():
        renamed = rename_keys(shapes, table)
        assert renamed != shapes
        assert rename_keys(renamed, reverse(table)) == shapes


def test_ambiguous_tables_are_told():
    with pytest.raises(ValueError, match="two keys .* renamed to 'b.x'"):
        rename_keys({'a.x': 1, 'b.x': 2}, {'a': 'b'})
    with pytest.raises(ValueError, match='a name of its own for each path'):
        reverse({'a': 'c', 'b': 'c'})


class Drawing(nn.Sequential):
    """Draws new weights when mmengine initialises it."""

    def init_weights(self):
        for module in self.modules():
            if hasattr(module, 'reset_parameters'):
                module.reset_parameters()


def test_nothing_is_drawn_anew_afterwards(tmp_path):
    static = static_twin(KWResNet)
    torch.save(static.state_dict(), tmp_path / 'static.pth')
    model = KWResNet(**BACKBONES[KWResNet], init_cfg=dict(
        type='StaticPretrained', checkpoint=str(tmp_path / 'static.pth')))
    # mmengine calls a child's init_weights after the initialisers of its parent.
    model.layer2 = Drawing(*model.layer2)
    detector = BaseModule()
    detector.backbone = model
    detector.init_weights()
    assert model.is_init
    model.eval()
    assert same(model, static)


ZEROS = [dict(type='Constant', val=0, layer=['Conv2d', 'Linear', '_BatchNorm', 'LayerNorm']),
         dict(type='Kaiming', layer='Conv2d'), dict(type='Normal', layer='Linear', std=1),
         dict(type='Constant', val=7, layer='Conv3d', override=dict(
             type='Constant', name='conv1', val=3))]


def listed(start, order):
    """A static start among other initialisers."""
    return dict(first=[start, *ZEROS], last=[*ZEROS, start],
                between=[*ZEROS[:2], start, *ZEROS[2:]], tuple=(start, *ZEROS))[order]


@pytest.mark.parametrize('order', ['first', 'last', 'between', 'tuple'])
@pytest.mark.parametrize('kind', ['StaticPretrained', 'mmengine.StaticPretrained',
                                  StaticPretrained])
def test_the_start_comes_after_all_other_initialisers(tmp_path, order, kind):
    # Initialisers behind it in the list replaced its static layers and attentions: error 0.45.
    static = static_twin(KWResNet)
    torch.save(static.state_dict(), tmp_path / 'static.pth')
    init_cfg = listed(dict(type=kind, checkpoint=str(tmp_path / 'static.pth')), order)
    for is_static in (False, True):
        model = KWResNet(**BACKBONES[KWResNet], static=is_static, init_cfg=init_cfg)
        model.init_weights()
        assert model.is_init and list(model.init_cfg) == list(init_cfg)
        assert same(model.eval(), static)
        # A start keeps the first layer and norm of an attention, which must not be all zero.
        assert all(m.norm1.weight.abs().min() > 0 and 0 < m.fc1.weight.std() < 0.5
                   for m in model.modules() if isinstance(m, Attention))
        # mmengine warns "called more than once" and does nothing.
        weight = model.conv1.weight.detach().clone()
        nn.init.constant_(model.conv1.weight, 2)
        model.init_weights()
        assert torch.equal(model.conv1.weight, torch.full_like(weight, 2))


def test_children_and_parents_come_before_the_start(tmp_path):
    static = static_twin(KWResNet)
    torch.save(static.state_dict(), tmp_path / 'static.pth')
    model = KWResNet(**BACKBONES[KWResNet], init_cfg=[
        dict(type='StaticPretrained', checkpoint=str(tmp_path / 'static.pth')), *ZEROS])
    model.layer1 = Sequential(*model.layer1, init_cfg=ZEROS)
    detector = BaseModule(init_cfg=[*ZEROS[:3], dict(
        type='Constant', val=1, layer='Conv2d',
        override=dict(type='Constant', name='backbone', val=0))])
    detector.backbone = model
    detector.neck = nn.Conv2d(2, 2, 1)
    detector.init_weights()
    assert same(model.eval(), static)
    assert torch.equal(detector.neck.weight, torch.ones(2, 2, 1, 1))


def test_what_a_start_says_of_its_own_parts_comes_after_it(tmp_path):
    static = static_twin(KWResNet)
    torch.save(static.state_dict(), tmp_path / 'static.pth')
    model = KWResNet(**BACKBONES[KWResNet], init_cfg=dict(
        type='StaticPretrained', checkpoint=str(tmp_path / 'static.pth'),
        override=dict(type='Constant', name='conv1', val=3)))
    model.init_weights()
    assert torch.equal(model.conv1.weight, torch.full_like(static.conv1.weight, 3))
    assert torch.equal(model.bn1.weight, static.bn1.weight)


def test_a_start_that_failed_can_be_tried_again(tmp_path):
    static = static_twin(KWResNet)
    model = KWResNet(**BACKBONES[KWResNet], init_cfg=dict(
        type='StaticPretrained', checkpoint=str(tmp_path / 'static.pth')))
    with pytest.raises(FileNotFoundError):
        model.init_weights()
    torch.save(static.state_dict(), tmp_path / 'static.pth')
    model.init_weights()
    assert same(model.eval(), static)


@pytest.mark.parametrize('other', ['Pretrained', PretrainedInit, 'StaticPretrained'])
def test_two_starts_are_refused(other):
    with pytest.raises(ValueError, match=r"must name one checkpoint .*got \['a.pth', 'b.pth'\]"):
        KWResNet(**BACKBONES[KWResNet], init_cfg=[
            dict(type='StaticPretrained', checkpoint='a.pth'), ZEROS[0],
            dict(type=other, checkpoint='b.pth')])


@pytest.mark.parametrize('order', ['first', 'last'])
def test_a_converted_module_starts_after_all_other_initialisers(tmp_path, order):
    kwargs = dict(depth=18, base_channels=8, norm_eval=False)
    theirs = ResNet(**kwargs)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    theirs.eval()
    torch.save(theirs.state_dict(), tmp_path / 'static.pth')
    start = dict(type='Pretrained', checkpoint=str(tmp_path / 'static.pth'))
    detector = BaseModule(init_cfg=ZEROS[:3])
    detector.backbone = MODELS.build(dict(type='KWConverted', module=dict(
        type='mmdet.ResNet', **kwargs, init_cfg=listed(start, order))))
    detector.init_weights()
    detector.backbone.eval()
    assert same(detector.backbone, theirs)
    nn.init.zeros_(detector.backbone.conv1.weight)
    detector.backbone.init_weights()
    assert detector.backbone.conv1.weight.abs().sum() == 0


def test_a_static_twin_and_every_budget(tmp_path):
    static = static_twin(KWResNet)
    file = tmp_path / 'static.pth'
    torch.save(static.state_dict(), file)
    assert same(started(KWResNet, file, static=True), static)
    assert same(started(KWResNet, file, kw_cfg=dict(cell_num_ratio=4)), static)
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static_weights, 'print_log', lambda message, logger, level: said.append(
            (level, message)))
        for budget in (0.5, 1):
            started(KWResNet, file, kw_cfg=dict(cell_num_ratio=budget))
    assert [level for level, _ in said] == [logging.WARNING, logging.INFO]
    assert 'Nothing is left' in said[0][1] and 'Nothing is left' not in said[1][1]
    with pytest.raises(ValueError, match=r'1 missing: conv1.weight; 1 unknown: conv.weight$'):
        torch.save(rename_keys(static.state_dict(), {'conv1': 'conv'}), file)
        started(KWResNet, file, static=True)


def test_wrong_checkpoints_are_told(tmp_path):
    file = tmp_path / 'static.pth'
    state = static_twin(KWResNet).state_dict()
    del state['layer1.0.conv1.weight']
    torch.save(state | {'layer5.weight': torch.zeros(1), 'bn1.weight': torch.zeros(3)}, file)
    with pytest.raises(ValueError, match=r'1 missing: layer1.0.conv1.weight; 1 unknown: '
                       r'layer5.weight; 1 misshapen: bn1.weight \(3,\) for \(8,\)'):
        started(KWResNet, file)
    torch.save(dict(epoch=1, optimizer={}), file)
    with pytest.raises(ValueError, match=r"must hold tensors, .*keys are \['epoch', 'optimizer'\]"):
        started(KWResNet, file)
    with pytest.raises(FileNotFoundError, match='nowhere.pth'):
        started(KWResNet, tmp_path / 'nowhere.pth')
    with pytest.raises(TypeError, match='init_cfg of a KW backbone, got that of a ReLU'):
        StaticPretrained('x.pth')(nn.ReLU())
    with pytest.raises(ValueError, match="set type='StaticPretrained' to start from them"):
        KWResNet(50, base_channels=8, init_cfg=dict(
            type='Pretrained', checkpoint='torchvision://resnet50'))


class Evil:
    def __reduce__(self):
        return print, ('run',)


def test_a_file_cannot_run_code(tmp_path, capsys):
    torch.save(dict(state_dict=Evil()), tmp_path / 'evil.pth')
    with pytest.raises(ValueError, match='refuses to build'):
        started(KWResNet, tmp_path / 'evil.pth')
    assert 'run' not in capsys.readouterr().out


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Torch's folder, and the downloads into it, which are replaced."""
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path / 'hub'))
    fetched = []

    def download(url, file, hash_prefix, progress):
        fetched.append((url, hash_prefix))
        torch.save({}, file)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    return fetched


def test_torchvision_names_need_no_torchvision(tmp_path, hub):
    for _ in range(2):  # the second finds the file
        file = locate_checkpoint('torchvision://resnet50')
        assert file == str(tmp_path / 'hub/checkpoints/resnet50-0676ba61.pth')
    assert hub == [('https://download.pytorch.org/models/resnet50-0676ba61.pth', '0676ba61')]
    locate_checkpoint('https://example.org/a/net.pth?download=true')
    assert hub[1:] == [('https://example.org/a/net.pth?download=true', None)]
    # A date does not identify the content.
    locate_checkpoint('https://example.org/net-20240131.pth')
    assert hub[2:] == [('https://example.org/net-20240131.pth', None)]
    assert locate_checkpoint('weights/net.pth') == 'weights/net.pth'
    assert locate_checkpoint(r'C:\weights\net.pth') == r'C:\weights\net.pth'


def test_files_of_one_name_are_kept_apart(hub):
    urls = [f'https://example.org/{where}' for where in ('a/net.pth', 'b/net.pth',
                                                         'b/net.pth?version=2')]
    files = [locate_checkpoint(url) for url in urls]
    assert len(set(files)) == 3 and {Path(file).name for file in files} == {'net.pth'}
    assert [locate_checkpoint(url) for url in urls] == files
    assert [url for url, _ in hub] == urls
    # A file with its hash in the name is the same from any URL.
    first, second = (locate_checkpoint(f'https://{host}.org/net-0676ba61.pth') for host in 'ab')
    assert first == second and len(hub) == 4


def test_other_processes_wait_for_the_first(hub, monkeypatch):
    order = []
    monkeypatch.setattr(checkpoint_names, 'get_rank', lambda: 1)
    monkeypatch.setattr(checkpoint_names, 'barrier', lambda: order.append(len(hub)))
    locate_checkpoint('https://example.org/net.pth')
    assert order == [0] and len(hub) == 1  # a process with another disk downloads afterwards


def test_open_mmlab_names(hub, monkeypatch, tmp_path):
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path))
    (tmp_path / 'open_mmlab.json').write_text(json.dumps({'ours': str(tmp_path / 'x.pth')}))
    assert locate_checkpoint('open-mmlab://ours') == str(tmp_path / 'x.pth')
    locate_checkpoint('open-mmlab://detectron2/resnet50_caffe')
    url = mmengine_checkpoint.get_external_models()['detectron2/resnet50_caffe']
    assert [u for u, _ in hub] == [url]


@pytest.mark.parametrize('name, message', [
    ('torchvision://vgg16', r"one of torchvision's \['convnext_base'.*of others give the URL"),
    ('open-mmlab://no_such', "mmengine knows, 'no_such' is not"),
    ('s3://bucket/net.pth', 'must be a path, a URL, or a name with'),
])
def test_unknown_names_are_told(name, message):
    with pytest.raises(ValueError, match=message):
        locate_checkpoint(name)


def test_a_machine_without_a_network(tmp_path, monkeypatch):
    # It used to end in a bare URLError.
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))

    def download(*args, **kwargs):
        raise URLError('no route')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    with pytest.raises(DownloadFailed, match=r'https://download.pytorch.org/models/resnet50.*pth '
                       r'cannot be downloaded .*model.backbone.init_cfg.checkpoint=FILE'):
        locate_checkpoint('torchvision://resnet50')
