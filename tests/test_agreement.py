"""Predictions and gradients depend neither on the batch, nor on the memory format of images, nor on
whether the compiled products are used.

Detections for a single image differed from those for the same image in a batch, because its feature
maps were channels-last, which RoIAlign reads as contiguous. Those of a ConvNeXt were always
channels-last.
"""
import copy
import itertools
import re

import pytest
import torch
from config_files import CONFIGS, SEG_CONFIGS, read_config
from mmdet.structures import DetDataSample
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from optimised import randomise
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kw_mm import optimize_for_inference_
from kw_mm.config_types import all_dicts, without_downloads_
from kw_mm.ops import use_cpu_products

BATCH = 4
NUM_CLASSES = 3
SHAPE = 32, 64  # the time of two stages grows with the number of anchors


def model_key(name):
    """Of a config: its method, and its backbone whatever the budget."""
    file = name.split('/')[1]
    backbone = re.search('r18|r50|convnext|mobilenet|regnet|swin', file)
    return backbone.group(), file.split('_')[0]


# One config of each method and backbone; ConvNeXt's static twin, which was wrong as well.
MODELS = list({model_key(name): name for name in CONFIGS if '_kw' in name}.values()) + [
    'mask_rcnn/mask-rcnn_convnext-t_fpn_ms-adamw-1x_coco.py']


def small(cfg):
    """The config of a model about 8 times narrower, without randomness and hard decisions."""
    model = without_downloads_(cfg.model)
    shrink_backbone(model.backbone)
    for _, node in all_dicts({key: value for key, value in model.items() if key != 'backbone'}):
        for key, value in node.items():
            # DINO's encodings of positions have the width of its authors.
            if re.search('channels' if model.type != 'DINO' else 'feedforward_channels', key):
                node[key] = narrow(value)
            elif key == 'num_classes':
                node[key] = NUM_CLASSES
            elif key == 'class_weight' and isinstance(value, list):
                node[key] = None
            elif key == 'dropout_ratio':
                node[key] = 0
            elif key == 'iou_threshold':  # so that no rounding error suppresses a box
                node[key] = 1
            elif key == 'score_thr':
                node[key] = 0
            elif key == 'max_per_img':
                # All proposals, because it is random which of two equal ones is dropped.
                node[key] = 20 if value < 1000 else 10_000
            elif key == 'sampler':
                value.num = 10_000
    if model.type == 'DINO':
        model.num_queries = 20
        model.encoder.num_layers = model.decoder.num_layers = 2
    if model.test_cfg.get('mode') == 'slide':
        model.test_cfg.mode = 'whole'
    return model


def narrow(value):
    if isinstance(value, (list, tuple)):
        return type(value)(map(narrow, value))
    return value // 8 if value >= 64 else value


def shrink_backbone(backbone):
    inner = backbone.get('module', backbone)
    if 'drop_path_rate' in inner:
        inner.drop_path_rate = 0.0
    if inner.type == 'KWResNet' and inner.depth == 50:
        inner.base_channels = 8
    elif inner.type == 'KWConvNeXt':
        inner.arch = dict(depths=(1, 1, 1, 1), channels=(12, 24, 48, 96))
    elif inner.type == 'KWMobileNetV2':
        inner.widen_factor = 0.25
    elif inner.type == 'RegNet':
        inner.arch = dict(w0=24, wa=48, wm=2.2, group_w=8, depth=6, bot_mul=1.0)
    elif inner.type == 'SwinTransformer':
        inner.update(embed_dims=24, depths=(1, 1, 1, 1))


def fit_to_backbone(model, backbone):
    """Sets the input channels of necks and heads to those of the backbone."""
    backbone.eval()
    with torch.no_grad():
        channels = [y.shape[1] for y in backbone(torch.randn(1, 3, *SHAPE))]
    if 'neck' in model:
        model.neck.get('module', model.neck).in_channels = channels
        return
    for head in (model.decode_head, model.get('auxiliary_head')):
        if head is not None:
            index = head.get('in_index', -1)
            head.in_channels = [channels[i] for i in index] if isinstance(
                index, (list, tuple)) else channels[index]
            if 'c1_in_channels' in head:
                head.c1_in_channels = channels[0]


def build(name):
    from mmdet.registry import MODELS as DETECTORS
    from mmseg.registry import MODELS as SEGMENTORS
    registry = SEGMENTORS if name in SEG_CONFIGS else DETECTORS
    model = small(read_config(name))
    torch.manual_seed(0)
    fit_to_backbone(model, revert_sync_batchnorm(registry.build(copy.deepcopy(model.backbone))))
    model = revert_sync_batchnorm(registry.build(model))
    randomise(model.backbone)
    for key, parameter in model.named_parameters():
        # Heads start with almost equal scores for everything.
        if key.startswith('backbone'):
            continue
        if parameter.dim() > 1:
            nn.init.xavier_normal_(parameter)
        elif key.endswith('.weight'):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif parameter.dim() == 1:
            nn.init.normal_(parameter, 0, 0.2)
    return model


def make_samples(name, num):
    generator = torch.Generator().manual_seed(1)
    height, width = SHAPE
    meta = dict(img_shape=SHAPE, ori_shape=SHAPE, pad_shape=SHAPE, batch_input_shape=SHAPE,
                scale_factor=(1.0, 1.0), img_id=0)
    samples = []
    for _ in range(num):
        if name in SEG_CONFIGS:
            labels = torch.randint(NUM_CLASSES, (1, *SHAPE), generator=generator)
            samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=meta))
            continue
        from mmdet.structures.mask import BitmapMasks
        corners = torch.rand(3, 2, generator=generator) * torch.tensor([width / 2, height / 2])
        sizes = torch.rand(3, 2, generator=generator) * 8 + 8
        boxes = torch.cat((corners, corners + sizes), 1)
        masks = torch.zeros(3, *SHAPE, dtype=torch.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
            mask[y1:y2, x1:x2] = 1
        samples.append(DetDataSample(
            gt_instances=InstanceData(bboxes=boxes, labels=torch.arange(3) % NUM_CLASSES,
                                      masks=BitmapMasks(masks.numpy(), *SHAPE)),
            ignored_instances=InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0).long()),
            metainfo=meta))
    return samples


def predict(name, model, images):
    """The predictions for each image: logits of classes, or instances."""
    samples = make_samples(name, len(images))
    with torch.no_grad():
        if name in SEG_CONFIGS:
            return [sample.seg_logits.data for sample in model.predict(images, samples)]
        return [sample.pred_instances for sample in model.predict(images, samples, rescale=False)]


def assert_same(found, expected, context):
    if isinstance(found, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=context)
        return
    assert len(found) == len(expected) > 0, context
    for box, label, score in zip(found.bboxes, found.labels, found.scores):
        # Equal scores may come in any order, and which of them is the last to be kept is random.
        if score - expected.scores.min() < 5e-6:
            continue
        alike = (expected.labels == label) & ((expected.scores - score).abs() < 1e-4) & (
            (expected.bboxes - box).abs().amax(1) < 1e-4 * max(SHAPE))
        assert alike.any(), context
    if 'masks' in found:
        differ = (found.masks.flatten(1).sum(1).sort()[0]
                  - expected.masks.flatten(1).sum(1).sort()[0]).abs()
        assert differ.max() <= 1e-3 * SHAPE[0] * SHAPE[1], context


def step(name, model, images):
    """Losses and gradients of a training step.

    Batch norms use their running statistics. With those of two small images, or of two samples in
    an attention, rounding errors would grow to percents.
    """
    torch.manual_seed(0)
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    model.zero_grad()
    loss, losses = model.parse_losses(model.loss(images, make_samples(name, len(images))))
    loss.backward()
    return losses, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected, context):
    assert set(found[0]) == set(expected[0])
    for key, loss in expected[0].items():
        torch.testing.assert_close(found[0][key], loss, rtol=1e-4, atol=1e-4, msg=context)
    least = 1e-3 * max(grad.norm() for grad in expected[1].values())
    assert set(found[1]) == set(expected[1])
    for key, grad in expected[1].items():
        assert (found[1][key] - grad).norm() <= 1e-3 * (grad.norm() + least), (context, key)


@pytest.fixture
def products():
    yield use_cpu_products
    use_cpu_products(True)


@pytest.mark.parametrize('name', [
    name if 'shapes' in name else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_a_model_agrees_with_itself(name, products):
    formats = torch.contiguous_format, torch.channels_last
    with DefaultScope.overwrite_default_scope('mmseg' if name in SEG_CONFIGS else 'mmdet'):
        model = build(name)
        images = torch.randn(BATCH, 3, *SHAPE)
        products(False)
        state = copy.deepcopy(model.state_dict())
        expected = step(name, model, images[:2])
        for compiled, memory_format in itertools.product((False, True), formats):
            if compiled or memory_format == torch.channels_last:
                products(compiled)
                model.load_state_dict(state)
                found = step(name, model, images[:2].contiguous(memory_format=memory_format))
                assert_same_step(found, expected, f'step: {compiled=}, {memory_format}')
        model.load_state_dict(state)
        model.eval()
        products(False)
        expected = predict(name, model, images)
        optimised = copy.deepcopy(model)
        if '_kw' in name:
            optimize_for_inference_(optimised)
        for compiled, twin, memory_format, batch in itertools.product(
                (False, True), (model, optimised), formats, (1, 2, BATCH)):
            products(compiled)
            found = predict(name, twin, images[:batch].contiguous(memory_format=memory_format))
            for pair in zip(found, expected):
                assert_same(*pair, f'{compiled=}, optimised={twin is optimised}, '
                                   f'{memory_format}, {batch=}')
