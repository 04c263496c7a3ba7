"""Parameters and multiply-adds: by hand, by formulas, and of well-known networks."""
from pathlib import Path

import pytest
import torch
from mmengine.analysis import FlopAnalyzer, get_model_complexity_info
from mmengine.config import Config, ConfigDict
from needs import needs_operators
from optimised import bases_everywhere
from torch import nn

from kw_mm import (
    KWConv2d,
    KWConvNeXt,
    KWMobileNetV2,
    KWResNet,
    optimize_for_inference_,
)
from kw_mm.engine.complexity import input_size, measure_config, measure_module

CONFIGS = Path(__file__).parents[2] / 'configs'


def measure(build, size):
    with torch.device('meta'):
        return measure_module(build(), torch.empty(1, *size))['']


def test_a_layer_by_hand():
    # 36 pieces of 8 x 8: 9 positions, 2 output groups, 2 input groups; b = 1/2 gives 18 cells.
    found = measure(lambda: KWConv2d(16, 16, 3, padding=1, stride=2, kw_cfg=dict(
        cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5)), (16, 10, 14))
    attention = 16 * 16 + 16 * 36 * 19
    assembly = 36 * 18 * 64
    assert found.attention_flops == attention
    assert found.assembly_flops == assembly
    assert found.flops == attention + assembly + 16 * 16 * 9 * 5 * 7
    assert found.cell_parameters == 18 * 64
    assert found.attention_parameters == 16 * 16 + 2 * 16 + (16 + 1) * 36 * 19
    assert found.parameters == found.cell_parameters + found.attention_parameters + 16


def test_groups_are_not_counted_as_a_full_convolution():
    found = measure(lambda: KWConv2d(8, 8, 3, groups=8, bias=False), (8, 7, 7))
    # One warehouse of 8 * 1 cells at 9 positions: 9 mixtures of 9 cells.
    assert (found.attention_flops, found.assembly_flops) == (8 * 16 + 16 * 9 * 10, 9 * 9 * 8)
    assert found.flops == found.attention_flops + found.assembly_flops + 8 * 9 * 5 * 5


@pytest.mark.parametrize('kw_cfg', [
    dict(cell_num_ratio=1), dict(cell_num_ratio=4),
    dict(cell_num_ratio=0.5, cell_inplane_ratio=0.5, cell_outplane_ratio=0.5,
         nonlocal_basis_ratio=1 / 16)])
def test_a_network_by_its_plan(kw_cfg):
    with torch.device('meta'):
        model = KWResNet(50, kw_cfg=kw_cfg)
        small, large = (measure_module(model, torch.empty(1, 3, size, size))['']
                        for size in (64, 224))
    attention = assembly = 0
    for layer in model.plan.layers.values():
        m, n, own = layer.num_mixtures, layer.num_cells, layer.assignment.num_cells
        width = own + layer.num_basis + 1 if layer.num_basis else n + 1
        attention += layer.hidden * (layer.spec.in_channels + m * width)
        attention += m * layer.num_basis * (n - own)
        assembly += m * n * layer.cell_shape[0] * layer.cell_shape[1]
    assert (large.attention_flops, large.assembly_flops) == (attention, assembly)
    # Neither depends on the image, and the convolutions cost as in the static network.
    assert (small.attention_flops, small.assembly_flops) == (attention, assembly)
    assert large.flops - attention - assembly == 4_087_136_256
    assert large.cell_parameters == model.plan.num_cell_parameters
    assert large.attention_parameters == model.plan.num_attention_parameters


# With their classifiers, as torchvision publishes.
@pytest.mark.parametrize('backbone, width, parameters, billions', [
    (lambda: KWResNet(18, static=True), 512, 11_689_512, '1.814'),
    (lambda: KWResNet(50, static=True), 2048, 25_557_032, '4.089'),
    (lambda: KWConvNeXt(out_indices=(3,), static=True), 768, 28_589_128, '4.456'),
    (lambda: KWMobileNetV2(static=True), 1280, 3_504_872, '0.301')])
def test_static_networks(backbone, width, parameters, billions):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = backbone()
            self.fc = nn.Linear(width, 1000)

        def forward(self, x):
            return self.fc(self.backbone(x)[-1].mean((2, 3)))

    found = measure(Classifier, (3, 224, 224))
    assert found.parameters == parameters
    assert f'{found.flops / 1e9:.3f}' == billions
    assert (found.attention_flops, found.assembly_flops, found.cell_parameters) == (0, 0, 0)


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('device', ['meta', 'cpu'])
def test_three_samples_cost_three_times_as_much(kernel_size, device):
    # They are convolved in other ways, with batched products.
    with torch.device(device):
        layer = KWConv2d(8, 8, kernel_size)
        one, three = (measure_module(layer, torch.zeros(n, 8, 6, 6))[''] for n in (1, 3))
    for field in ('flops', 'attention_flops', 'assembly_flops'):
        assert getattr(three, field) == 3 * getattr(one, field)
    assert three.parameters == one.parameters


def test_parts():
    with torch.device('meta'):
        model = nn.Sequential(nn.Conv2d(3, 8, 1), KWConv2d(8, 8, 1), nn.ReLU())
        x = torch.empty(1, 3, 4, 4)
        found = measure_module(model, x, parts=['0', '1'])
        assert found['0'].flops == 3 * 8 * 16
        assert found['0'].flops + found['1'].flops == found[''].flops
        assert found[''].assembly_flops == found['1'].assembly_flops > 0
        with pytest.raises(ValueError, match="parts must be modules that are called.*got '2'"):
            measure_module(model, x, parts=['2'])


def test_two_stages():
    cfg = Config.fromfile(CONFIGS / 'demo' / 'mask-rcnn_kw1x-r18_fpn_shapes.py')
    parts = ['backbone', 'neck', 'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head']
    found = measure_config(cfg, parts=parts)
    boxes, masks = cfg.model.test_cfg.rpn.max_per_img, cfg.model.test_cfg.rcnn.max_per_img
    assert found['roi_head.bbox_head'].flops == boxes * (
        64 * 49 * 256 + 256 * 256 + 256 * (5 + 4))
    assert found['roi_head.mask_head'].flops == masks * (
        2 * 64 * 64 * 9 * 14 * 14 + 64 * 64 * 4 * 14 * 14 + 64 * 28 * 28)
    assert found[''].flops == sum(found[part].flops for part in parts)
    assert found['rpn_head'].flops > 0
    # A cascade counts each of its stages.
    cascade = Config.fromfile(
        CONFIGS / 'cascade_rcnn' / 'cascade-mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco.py')
    cascade.model.backbone = dict(
        type='KWResNet', depth=18, base_channels=16, kw_cfg=dict(cell_num_ratio=1))
    cascade.model.neck.in_channels = [16, 32, 64, 128]
    stages = [f'roi_head.{kind}_head.{i}' for kind in ('bbox', 'mask') for i in range(3)]
    found = measure_config(cascade, (64, 64), stages)
    # Per box: 1024 channels, 81 classes and four coordinates for all classes.
    assert [found[stage].flops for stage in stages[:3]] == [
        1000 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 4))] * 3
    assert [found[stage].flops for stage in stages[3:]] == [
        100 * (4 * 256 * 256 * 9 + 256 * 256 * 4 + 4 * 256 * 80) * 14 * 14] * 3


@pytest.mark.slow
def test_a_model_whose_shapes_hang_on_values():
    # DINO chooses its queries among the positions of the encoder.
    cfg = Config.fromfile(CONFIGS / 'dino' / 'dino-4scale_kw1x-r50_8xb2-12e_coco.py')
    cfg.merge_from_dict(dict(model=dict(
        encoder=dict(num_layers=1), decoder=dict(num_layers=1),
        backbone=dict(depth=18, base_channels=16), neck=dict(in_channels=[32, 64, 128]))))
    found = []
    for cfg.model.num_queries in (20, 21, 22):
        found.append(measure_config(cfg, (64, 96)))
    assert len({f['backbone'].flops for f in found}) == 1
    # The part that grows with the square of the queries: all attend to all, in 256 channels, twice.
    first, second, third = (f[''].flops for f in found)
    assert third - 2 * second + first == 2 * 2 * 256


def test_a_segmentor_is_counted_without_the_head_that_only_trains():
    head = dict(type='FCNHead', in_channels=128, channels=32, num_convs=1, num_classes=7,
                dropout_ratio=0, norm_cfg=dict(type='SyncBN'), in_index=3)
    model = dict(
        type='EncoderDecoder', data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 96)),
        backbone=dict(type='KWResNet', depth=18, base_channels=16,
                      kw_cfg=dict(cell_num_ratio=1)),
        decode_head=head, auxiliary_head=head, test_cfg=dict(mode='whole'))
    found = measure_config(Config(dict(default_scope='mmseg', model=model)))
    # At a stride of 32 a crop of 64 x 96 has six positions; concat_input adds a convolution.
    convs = 9 * 128 * 32 + 9 * (128 + 32) * 32 + 32 * 7
    assert found[''].flops - found['backbone'].flops == 6 * convs
    parameters = convs + 4 * 32 + 7
    assert found[''].parameters - found['backbone'].parameters == 2 * parameters


@pytest.mark.parametrize('name, size', [
    ('mask_rcnn/mask-rcnn_kw1x-r50_fpn_ms-adamw-1x_coco', (800, 1344)),
    ('rtmdet/rtmdet-ins_kw1x-r50_8xb32-300e_coco', (640, 640)),
    ('demo/mask-rcnn_kw1x-r18_fpn_shapes', (128, 128))])
def test_the_size_that_a_config_tells(name, size):
    assert input_size(Config.fromfile(CONFIGS / f'{name}.py')) == size


def test_no_size_is_told():
    cfg = ConfigDict(model=dict(), test_dataloader=dict(dataset=dict(pipeline=[
        dict(type='LoadImageFromFile'), dict(type='Resize', scale_factor=2.0)])))
    with pytest.raises(ValueError, match='must have a Resize with a scale'):
        input_size(cfg)


@needs_operators
@pytest.mark.parametrize('grad', [False, True])
def test_mmengine_counts_what_kernels_cost(grad):
    # mmengine skipped the operators, and with gradients on its tracing failed: unordered_map::at.
    net = nn.Sequential(KWConv2d(16, 16, 3, padding=1), nn.ReLU(), KWConv2d(16, 32, 1)).eval()
    x = torch.randn(2, 16, 5, 7)
    # For one sample, by layer: attention, norm of its hidden units, assembly, convolution. There
    # are as many cells as mixtures, 9 of 16 x 16 and 1 of 32 x 16.
    first = 16 * 16 + 16 * 9 * 10 + 2 * 16 + 9 * 9 * 256 + 16 * 16 * 9 * 35
    second = 16 * 16 + 16 * 1 * 2 + 2 * 16 + 1 * 1 * 32 * 16 + 16 * 32 * 35
    with torch.set_grad_enabled(grad):
        info = get_model_complexity_info(net, inputs=(x,), show_table=False, show_arch=False)
        by_operator = FlopAnalyzer(net, (x,)).unsupported_ops_warnings(False).by_operator()
    assert info['flops'] == 2 * (first + second)
    assert by_operator['assemble'] == 2 * (9 * 9 * 256 + 32 * 16)


@needs_operators
def test_mmengine_counts_bases():
    net = nn.Sequential(KWConv2d(16, 16, 3, padding=1)).eval()
    with bases_everywhere():
        optimize_for_inference_(net)
    x = torch.randn(2, 16, 5, 7)
    counts = FlopAnalyzer(net, (x,)).unsupported_ops_warnings(False).by_operator()
    # 16 hidden units and the bias, each with a whole kernel.
    assert counts['mix_bases'] == 2 * 17 * 16 * 16 * 9
    assert counts['conv'] == 2 * 16 * 16 * 9 * 35
