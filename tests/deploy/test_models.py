"""Whole detectors and segmentors: in the form for export, and as files, they find the same."""
import copy

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from small_models import DETECTORS, SEGMENTORS, build, small_config
from tensorrt_table import find_violations

from kw_mm.deploy import compare, export_form, export_model
from kw_mm.deploy.objects import Objects, count_unexplained, match_objects
from kw_mm.deploy.preparation import describe_input
from kw_mm.engine.inference import scope_of
from kw_mm.export import ModelFile


def images(batch, size):
    generator = torch.Generator().manual_seed(batch)
    x = torch.randn(batch, 3, 8, 8, generator=generator) * 1.5
    return F.interpolate(x, size, mode='bilinear')


def predict(model, cfg, x, sizes, scale=1.0):
    """What MMDetection says of images that are padded to one size."""
    from mmdet.structures import DetDataSample
    samples = [DetDataSample(metainfo=dict(
        img_shape=size, ori_shape=tuple(int(side / scale) for side in size),
        batch_input_shape=tuple(x.shape[2:]), pad_shape=tuple(x.shape[2:]),
        scale_factor=(scale, scale))) for size in sizes]
    with torch.no_grad(), scope_of(cfg):
        return [sample.pred_instances for sample in model.predict(x, samples)]


@pytest.mark.parametrize('name', [
    *(pytest.param(name, marks=pytest.mark.slow) for name in DETECTORS if name != 'faster_rcnn'),
    'faster_rcnn'])
def test_detectors_find_what_mmdetection_finds(name):
    cfg = small_config(name)
    model = build(cfg)
    form = export_form(model, 'cells')
    x = images(2, (96, 128))
    # One image smaller than the batch: clipping, valid ratios and masks of DINO.
    sizes = [(96, 128), (81, 100)]
    x[1, :, 81:] = x[1, :, :, 100:] = 0
    found = form(x, torch.tensor(sizes, dtype=torch.float32))
    count = 0
    for i, expected in enumerate(predict(model, cfg, x, sizes)):
        kept = found[2][i] >= 0
        scores, boxes, labels = (y[i][kept].numpy() for y in found[:3])
        assert (np.diff(scores) <= 0).all()
        matching = match_objects(Objects(
            expected.scores.numpy(), expected.bboxes.numpy(), expected.labels.numpy()),
            Objects(scores, boxes, labels), 128)
        assert matching.error < 1e-4
        assert not matching.only_expected and not matching.only_found
        assert (found[0][i][~kept] < 0).all()
        count += len(labels)
    assert count > 10
    assert len(form.output_names) == len(found)


@pytest.mark.slow
@pytest.mark.parametrize('name', SEGMENTORS)
def test_segmentors(name):
    cfg = small_config(name)
    model = build(cfg)
    form = export_form(model, 'cells')
    for batch, size in ((1, (64, 96)), (2, (96, 64))):
        x = images(batch, size)
        with torch.no_grad():
            expected = model.encode_decode(x, [dict(img_shape=size, ori_shape=size)] * batch)
            torch.testing.assert_close(form(x)[0], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['rtmdet', 'dino'])
def test_files(tmp_path, name):
    # tests/tools has a Mask R-CNN and a Semantic FPN. Without KW layers, whose files have tests of
    # their own, half as many nodes are written.
    cfg = small_config(name)
    cfg.model.backbone.update(static=True, kw_cfg=None)
    model = build(cfg)
    path = tmp_path / 'model.onnx'
    form = export_model(model, cfg, path, 'onnx')
    comparisons = compare(ModelFile(path), form, model, cfg)
    assert len(comparisons) == 2 and all(c.equal for c in comparisons), comparisons
    proto = onnx.load(path)
    onnx.checker.check_model(proto, full_check=True)
    assert not find_violations(proto)


def test_objects_on_one_side_alone_must_be_a_matter_of_rounding():
    # Up to one in a hundred was forgiven, whatever the cause.
    box = np.float32([0, 0, 10, 10])
    objects = [Objects(np.float32([0.9, 0.5]), np.stack((box, box + 20)), np.array([0, 1]))]
    fewer = [Objects(*(part[:1] for part in objects[0]))]
    image = torch.ones(1, 3, 8, 8)

    def wavering(x):
        """A detector whose second object depends on a comparison that rounding may tip."""
        return objects if x.mean() >= 1 else fewer

    for expected, found in ((objects, fewer), (fewer, objects)):
        matchings = [match_objects(*pair, 100) for pair in zip(expected, found)]
        assert matchings[0].pairs == [(0, 0)]
        alone = matchings, found, image
        assert count_unexplained(*alone, wavering, expected) == 0
        assert count_unexplained(*alone, lambda _, same=expected: same, expected) == 1


def test_the_pipeline_in_numbers():
    cfg = small_config('rtmdet')
    found = describe_input(cfg)
    assert found['resize'] == dict(scale=[640, 640], keep_ratio=True)
    assert found['pad_image'] == dict(size=[640, 640], value=[114, 114, 114])
    assert found['channel_order'] == 'RGB'
    cfg.test_dataloader.dataset.pipeline.insert(1, dict(type='RandomFlip'))
    with pytest.raises(ValueError, match='the test pipeline must be made of .* got RandomFlip'):
        describe_input(cfg)


def test_what_cannot_be_exported_is_told():
    cfg = small_config('faster_rcnn')
    model = build(cfg)
    with pytest.raises(ValueError, match="part must be 'whole' or 'backbone'"):
        export_form(model, part='neck')
    model.train()
    with pytest.raises(ValueError, match='must be in evaluation mode'):
        export_form(model)
    model.eval()
    model.backbone.layer1[0].conv1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match='free of forward hooks'):
        export_form(model)
    model = build(cfg)

    class OtherHead(type(model.rpn_head)):
        pass

    odd = copy.deepcopy(model)
    odd.rpn_head.__class__ = OtherHead
    form = export_form(odd)
    with pytest.raises(ValueError, match=r'RPNHead can be exported here, got a .*OtherHead'):
        form(*form.example())
    odd.__class__ = type('Other', (type(odd),), {})
    with pytest.raises(ValueError, match="got a Other; part='backbone' exports"):
        export_form(odd)
    assert export_form(odd, part='backbone').kind == 'backbone'
