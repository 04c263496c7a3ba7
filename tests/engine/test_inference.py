"""Both toolboxes in one process: training, predicting, and tools/infer.py."""
import importlib.util
import re
from pathlib import Path

import cv2
import pytest
import torch
from mmdet.apis import inference_detector
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmseg.apis import inference_model, init_model
from pycocotools.coco import COCO

from kw_mm.datasets import SHAPE_CLASSES, write_shapes
from kw_mm.engine.inference import Predictor, find_images, scope_of
from kw_mm.engine.local_training import use_shapes

# For the three trainings.
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIGS = dict(det=ROOT / 'configs' / 'demo' / 'mask-rcnn_kw1x-r18_fpn_shapes.py',
               seg=ROOT / 'configs' / 'demo' / 'fpn_kw1x-r18_shapes.py')
WIDTHS = dict(det=[8, 16, 32, 64], seg=[8, 16, 32])
CLASSES = dict(det=SHAPE_CLASSES, seg=('background', *SHAPE_CLASSES))


@pytest.fixture(autouse=True, scope='module')
def scope():
    """Resets the default scope for the tests of other files."""
    with DefaultScope.overwrite_default_scope('mmengine'):
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('shapes'), num_train=4, num_val=2, size=64)


def config(kind, data):
    path = str(CONFIGS[kind])
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(use_shapes(str(data.root), path))
    cfg.merge_from_dict({
        'model.backbone.base_channels': 8, 'model.neck.in_channels': WIDTHS[kind],
        'train_dataloader.batch_size': 2, 'train_cfg.max_epochs': 1})
    return cfg


@pytest.fixture(scope='module')
def trained(data, tmp_path_factory):
    """The checkpoints of a detector, a segmentor and another detector, trained in this order."""
    checkpoints = []
    for kind in ('det', 'seg', 'det'):
        cfg = config(kind, data)
        cfg.work_dir = str(tmp_path_factory.mktemp(kind))
        runner = Runner.from_cfg(cfg)
        runner.train()
        assert runner.visualizer.dataset_meta['classes'] == CLASSES[kind]
        checkpoints.append(Path(cfg.work_dir, 'epoch_1.pth'))
    return checkpoints


@pytest.fixture(scope='module')
def predictors(data, trained):
    detector, segmentor, _ = trained
    return dict(det=Predictor(config('det', data), str(detector), 'cpu'),
                seg=Predictor(config('seg', data), str(segmentor), 'cpu'))


def test_each_training_has_its_own_classes(trained):
    for kind, checkpoint in zip(('det', 'seg', 'det'), trained, strict=True):
        meta = torch.load(checkpoint)['meta']
        assert tuple(meta['dataset_meta']['classes']) == CLASSES[kind]


def test_inferencers_take_turns(data, predictors, tmp_path):
    images = find_images([str(data.images('val'))])
    for kind in ('det', 'seg', 'seg', 'det', 'seg'):
        out_dir = tmp_path / kind
        written = predictors[kind](images, str(out_dir), score_thr=0, zoom=1)
        pictures = written.pictures
        assert [p.name for p in pictures] == ['000000.jpg', '000001.jpg']
        assert not written.unreadable and written.predictions.exists()
        assert predictors[kind].classes == CLASSES[kind]
        for image, picture in zip(images, pictures):
            drawn = cv2.imread(str(picture))
            assert drawn.shape == (64, 64, 3)
            assert abs(drawn.astype(int) - cv2.imread(image)).max() > 40
            picture.unlink()
        assert (out_dir / 'pred').is_dir() == (kind == 'seg')


def test_functions_of_the_toolboxes_need_the_scope(data, predictors, trained):
    # inference_detector builds a pipeline in each call. After a segmentor was built it ended in
    # TypeError: LoadAnnotations.__init__() got an unexpected keyword argument 'with_bbox'.
    image = str(data.images('val') / '000000.jpg')
    detector = predictors['det'].inferencer.model
    segmentor = init_model(config('seg', data), str(trained[1]), device='cpu')
    assert DefaultScope.get_current_instance().scope_name == 'mmseg'
    with scope_of(config('det', data)):
        found = inference_detector(detector, image)
    assert found.pred_instances.masks.shape[1:] == (64, 64)
    assert DefaultScope.get_current_instance().scope_name == 'mmseg'
    with scope_of(segmentor.cfg):
        assert inference_model(segmentor, image).pred_sem_seg.data.shape == (1, 64, 64)


@pytest.fixture
def infer():
    spec = importlib.util.spec_from_file_location('infer', ROOT / 'tools' / 'infer.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def options(kind):
    widths = str(WIDTHS[kind]).replace(' ', '')
    return ['--device', 'cpu', '--cfg-options', 'model.backbone.base_channels=8',
            f'model.neck.in_channels={widths}']


@pytest.mark.parametrize('kind, index', [('det', 2), ('seg', 1)])
def test_the_tool_writes_pictures(data, trained, tmp_path, capsys, infer, kind, index):
    image = data.images('val') / '000001.jpg'
    infer([str(CONFIGS[kind]), str(trained[index]), str(image), '--out-dir', str(tmp_path),
           *options(kind)])
    assert capsys.readouterr().out.splitlines()[-1].startswith(
        f'1 pictures in {tmp_path / "vis"}, predictions in {tmp_path / "pred"}')
    assert [path.name for path in (tmp_path / 'vis').iterdir()] == ['000001.jpg']


@pytest.mark.parametrize('checkpoint, image, message', [
    ('no.pth', 'a.jpg', "checkpoint 'no.pth' does not exist"),
    (None, 'no.jpg', "image 'no.jpg' does not exist"),
    (None, 'empty', "folder 'empty' must have images in it"),
    (None, ['a.jpg', 'full'], "names of their own.*more than one 'a'")])
def test_the_tool_reports_mistakes(trained, tmp_path, monkeypatch, capsys, infer, checkpoint,
                                   image, message):
    monkeypatch.chdir(tmp_path)
    for folder in ('empty', 'full'):
        Path(folder).mkdir()
    for path in ('a.jpg', 'full/a.jpg', 'empty/notes.txt'):
        Path(path).write_bytes(b'')
    images = [image] if isinstance(image, str) else image
    with pytest.raises(SystemExit) as exit_:
        infer([str(CONFIGS['seg']), checkpoint or str(trained[1]), *images, *options('seg')])
    assert exit_.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_scope_of_another_toolbox():
    with pytest.raises(ValueError, match="default_scope must be 'mmdet' or 'mmseg', got 'mmpose'"):
        scope_of(dict(default_scope='mmpose'))


def test_small_pictures_are_enlarged(data, predictors, tmp_path):
    for kind in ('det', 'seg'):
        written = predictors[kind]([str(data.images('val') / '000001.jpg')], str(tmp_path))
        assert cv2.imread(str(written.pictures[0])).shape == (512, 512, 3)


def test_detections_are_written_as_coco(data, predictors, tmp_path):
    images = find_images([str(data.images('val'))])
    written = predictors['det'](images, str(tmp_path))
    coco = COCO(str(written.predictions))
    assert [image['file_name'] for image in coco.imgs.values()] == ['000000.jpg', '000001.jpg']
    assert [category['name'] for category in coco.cats.values()] == list(SHAPE_CLASSES)
    for image, path in zip(coco.imgs.values(), images, strict=True):
        with scope_of(config('det', data)):
            found = inference_detector(predictors['det'].inferencer.model, path).pred_instances
        annotations = coco.imgToAnns[image['id']]
        # With any score; 0.3 is the limit for drawing only.
        assert len(annotations) == len(found) > 0
        for annotation, box, score, label, mask in zip(
                annotations, found.bboxes, found.scores, found.labels, found.masks, strict=True):
            x, y, width, height = annotation['bbox']
            assert torch.allclose(box, torch.tensor([x, y, x + width, y + height]), atol=1e-3)
            assert annotation['score'] == pytest.approx(float(score))
            assert annotation['category_id'] == int(label) + 1
            assert (coco.annToMask(annotation) == mask.numpy()).all()
            assert annotation['area'] == mask.sum()


def test_segmentations_are_written_as_label_maps(data, predictors, tmp_path):
    image = str(data.images('val') / '000001.jpg')
    written = predictors['seg']([image], str(tmp_path))
    assert written.predictions == tmp_path / 'pred'
    labels = cv2.imread(str(tmp_path / 'pred' / '000001.png'), cv2.IMREAD_UNCHANGED)
    with scope_of(config('seg', data)):
        found = inference_model(predictors['seg'].inferencer.model, image)
    assert (labels == found.pred_sem_seg.data[0].numpy()).all()


@pytest.mark.parametrize('kind, index', [('det', 2), ('seg', 1)])
def test_unreadable_images_are_passed_over(data, trained, tmp_path, capsys, infer, kind, index):
    # A run on a folder used to end at the first of them.
    folder = tmp_path / 'images'
    folder.mkdir()
    good = (data.images('val') / '000001.jpg').read_bytes()
    for name, content in (('a.jpg', b''), ('b.jpg', b'no image'), ('c.jpg', good)):
        (folder / name).write_bytes(content)
    with pytest.raises(SystemExit) as exit_:
        infer([str(CONFIGS[kind]), str(trained[index]), str(folder), '--out-dir', str(tmp_path),
               *options(kind)])
    assert exit_.value.code == 1
    out = capsys.readouterr()
    assert '1 pictures in' in out.out
    assert [line.rpartition('/')[2] for line in out.err.splitlines()
            if line.startswith('not an image')] == ['a.jpg', 'b.jpg']
    assert [path.name for path in (tmp_path / 'vis').iterdir()] == ['c.jpg']


@pytest.mark.parametrize('kind, index', [('det', 2), ('seg', 1)])
def test_an_optimised_model_finds_the_same(data, trained, predictors, kind, index):
    fast = Predictor(config(kind, data), str(trained[index]), 'cpu', optimize=True)
    modules = {type(module).__name__ for module in fast.inferencer.model.modules()}
    assert 'OptimizedConv' in modules and 'KWConv2d' not in modules
    image = str(data.images('val') / '000001.jpg')
    with scope_of(fast.cfg):
        actual, expected = fast._predict(image), predictors[kind]._predict(image)
    if kind == 'seg':
        assert (actual.pred_sem_seg.data == expected.pred_sem_seg.data).float().mean() > 0.999
    else:
        assert torch.allclose(actual.pred_instances.bboxes, expected.pred_instances.bboxes,
                              atol=1e-2)
