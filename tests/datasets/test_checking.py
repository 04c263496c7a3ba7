"""Data sets that would end or spoil a training are reported before a model is built."""
import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from kw_mm.datasets import check_data, write_shapes
from kw_mm.engine.local_training import use_shapes

ROOT = Path(__file__).parents[2]
CONFIGS = dict(det=ROOT / 'configs' / 'demo' / 'mask-rcnn_kw1x-r18_fpn_shapes.py',
               seg=ROOT / 'configs' / 'demo' / 'fpn_kw1x-r18_shapes.py')


@pytest.fixture
def data(tmp_path):
    return write_shapes(tmp_path / 'shapes', num_train=6, num_val=2, size=64)


def config(kind, data, **changes):
    path = str(CONFIGS[kind])
    cfg = Config.fromfile(path)
    cfg.merge_from_dict({**use_shapes(str(data.root), path), **changes})
    return cfg


def edit(data, change, split='train'):
    """Changes the annotations of a split in place."""
    path = data.annotations(split)
    coco = json.loads(path.read_text())
    change(coco)
    path.write_text(json.dumps(coco))


@pytest.mark.parametrize('kind', CONFIGS)
def test_a_good_data_set(data, kind):
    found = check_data(config(kind, data))
    # With few images, some classes may be missing in the maps that are read.
    assert not found.errors and not found.notes
    assert not [line for line in found.warnings if 'are in none of' not in line]
    assert [line.partition(' images')[0] for line in found.summaries] == ['train: 6', 'val: 2']


# Faults that end a training: a change of annotations, config or files, and its sentence.
def rename(coco):
    for category in coco['categories']:
        category['name'] = category['name'].upper()


def double_ids(coco):
    for annotation in coco['annotations'][:3]:
        annotation['id'] = 1


def drop(part, *keys):
    def change(coco):
        for item in coco[part]:
            for key in keys:
                item.pop(key)
    return change


def all_boxes(change):
    def edit_all(coco):
        for annotation in coco['annotations']:
            change(annotation)
    return edit_all


@pytest.mark.parametrize('change, message', [
    (rename, "none of metainfo.classes ('circle', 'square', 'triangle', ...) is a category of"),
    (double_ids, 'have the id of another one'),
    (drop('images', 'width'), '6 of 6 images in'),
    (drop('annotations', 'area'), "have no 'area'"),
    (drop('annotations', 'segmentation'), 'have no segmentation'),
    (all_boxes(lambda a: a.update(bbox=[5, 5])), 'have no bbox of four finite numbers'),
    (all_boxes(lambda a: a.update(bbox=[500, 500, 5, 5])), 'nothing of'),
    (lambda coco: coco.pop('categories'), 'is a category of'),
    (lambda coco: coco.pop('images'), "must hold lists 'images', 'annotations'")])
def test_annotations_that_end_a_training(data, change, message):
    edit(data, change)
    errors = check_data(config('det', data)).errors
    assert len(errors) == 1 and message in errors[0] and errors[0].startswith('train: ')


def test_files_that_are_missing_or_unreadable(data):
    image = data.images('train') / '000001.jpg'
    image.unlink()
    (data.images('train') / '000002.jpg').write_bytes(b'no image')
    data.annotations('val').write_text('{')
    gone, broken, val = check_data(config('det', data)).errors
    assert f'train: 1 of 6 images ({image}) do not exist' == gone
    assert 'train: 1 of 5 images read (' in broken and 'cannot be read' in broken
    assert 'cannot be read as JSON' in val
    # A sample may skip the broken image, but never the missing one.
    assert gone in check_data(config('det', data), sample=1).errors
    data.annotations('train').unlink()
    assert 'does not exist' in check_data(config('det', data)).errors[0]
    found = check_data(config('det', data, **{'val_evaluator.ann_file': 'no/file.json'}))
    assert "val_evaluator: ann_file 'no/file.json' does not exist" in found.errors[-1]


def test_images_that_training_would_skip_are_no_error(data):
    (data.images('train') / '000002.jpg').unlink()
    cfg = config('det', data)
    cfg.train_dataloader.dataset.pipeline[0].ignore_empty = True
    found = check_data(cfg)
    assert not found.errors and 'do not exist' in found.warnings[0]


def test_images_that_are_filtered_out_need_not_exist(data):
    def clear(coco):
        coco['annotations'] = [a for a in coco['annotations'] if a['image_id'] != 3]
    edit(data, clear)
    (data.images('train') / '000002.jpg').unlink()
    assert not check_data(config('det', data)).errors


def boxes_as_corners(annotation):
    x, y, width, height = annotation['bbox']
    annotation['bbox'] = [x, y, x + width, y + height]


@pytest.mark.parametrize('change, message', [
    (lambda coco: coco['categories'][0].update(name='disc'),
     "1 of 4 categories ('disc') of"),
    (lambda coco: coco['categories'].reverse(), 'must be in the order of the categories'),
    (lambda coco: coco['annotations'][0].update(bbox=[1, 1, 0, 5]), 'are empty'),
    (lambda coco: coco['annotations'][0].update(bbox=[70, 1, 5, 5]), 'lie outside'),
    (lambda coco: coco['annotations'][0].update(image_id=99), 'images that are not listed'),
    (lambda coco: coco['annotations'][0].update(segmentation=[[1, 1, 2, 2]], iscrowd=0),
     'have no polygon of three points'),
    (lambda coco: coco['images'][0].update(width=640), 'have another size than the annotations'),
    (all_boxes(boxes_as_corners), 'they look like (x1, y1, x2, y2)')])
def test_what_trains_but_is_not_meant(data, change, message):
    edit(data, change)
    found = check_data(config('det', data))
    assert not found.errors
    assert any(message in line and line.startswith('train: ') for line in found.warnings)


def test_heads_of_another_number_of_classes(data):
    found = check_data(config('det', data, **{'model.roi_head.bbox_head.num_classes': 80}))
    assert not found.errors
    assert 'model.roi_head.bbox_head.num_classes is 80, but metainfo has 4' in found.warnings[0]


def test_a_class_without_its_comma(data):
    found = check_data(config('det', data, **{
        'train_dataloader.dataset.metainfo.classes': 'ring'}))
    assert "must be a tuple of names, got 'ring'" in found.errors[0]


def labels(data, change):
    for path in data.semantic_maps('train').iterdir():
        cv2.imwrite(str(path), change(cv2.imread(str(path), cv2.IMREAD_UNCHANGED)))


@pytest.mark.parametrize('change, message', [
    (lambda m: m + 7, 'have labels that are no class: 7, 8'),
    (lambda m: np.stack([m, m, m], 2), 'have colours where each pixel must be the number'),
    (lambda m: m[:32], 'have another size than their image')])
def test_label_maps_that_end_a_training(data, change, message):
    labels(data, change)
    errors = check_data(config('seg', data)).errors
    assert len(errors) == 1 and message in errors[0]
    assert errors[0].startswith('train: 6 of 6 label maps read')


def test_label_maps_of_what_is_ignored(data):
    labels(data, lambda m: np.where(m > 0, 255, 0).astype(m.dtype))
    found = check_data(config('seg', data))
    assert not found.errors
    assert "4 of 5 classes ('circle', 'square', 'triangle', ...) are in none" in found.warnings[0]


def test_pairs_and_folders_of_segmentation(data):
    (data.semantic_maps('train') / '000001.png').unlink()
    (data.semantic_maps('val') / '000001.png').write_bytes(b'no image')
    missing, broken = check_data(config('seg', data)).errors
    assert 'train: 1 of 6 label maps' in missing and "'.png' (seg_map_suffix)" in missing
    assert 'val: 1 of 2 label maps read' in broken and 'cannot be read' in broken
    found = check_data(config('seg', data, **{'train_dataloader.dataset.img_suffix': '.jpeg'}))
    assert "ends in '.jpeg' (img_suffix); there are 6 that end in '.jpg'" in found.errors[0]
    found = check_data(config('seg', data, **{
        'train_dataloader.dataset.data_prefix.img_path': 'no'}))
    assert 'train: image folder' in found.errors[0] and 'does not exist' in found.errors[0]


def test_wrappers_and_unknown_kinds(data):
    cfg = config('det', data)
    inner = cfg.train_dataloader.dataset
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[
        dict(type='RepeatDataset', times=2, dataset=inner), dict(type='Mine', root='x')])
    edit(data, rename)
    found = check_data(cfg)
    assert found.errors[0].startswith('train[0]: none of metainfo.classes')
    assert found.notes == ['train[1]: data sets of type Mine are not checked']


def test_files_elsewhere_and_large_ones(data):
    cfg = config('det', data)
    cfg.train_dataloader.dataset.backend_args = dict(backend='petrel')
    found = check_data(cfg, max_json=10)
    assert not found.errors
    assert 'not on a disk of this machine' in found.notes[0] and 'is large' in found.notes[1]


def load_tool(name):
    spec = importlib.util.spec_from_file_location(
        Path(name).stem, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


def test_the_tool(data, tmp_path, capsys):
    path = tmp_path / 'config.py'
    config('det', data).dump(path)
    check = load_tool('analysis_tools/check_data')
    check([str(path)])
    assert capsys.readouterr().out.splitlines()[-1] == (
        'nothing was found that would end a training')
    edit(data, rename)
    with pytest.raises(SystemExit) as exit_:
        check([str(path), '--sample', '2'])
    assert exit_.value.code == 1
    assert 'error: train: none of metainfo.classes' in capsys.readouterr().out


@pytest.mark.parametrize('tool', ['train', 'test'])
def test_runs_check_before_they_build(data, tmp_path, capsys, monkeypatch, tool):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'config.py'
    cfg = config('det', data)
    cfg.model = dict(type='NoSuchModel')  # building it would be another error
    cfg.dump(path)
    for split in ('train', 'val'):
        edit(data, rename, split)
    weights = []
    if tool == 'test':
        import torch
        torch.save(dict(state_dict={}, meta={}), 'weights.pth')
        weights = ['weights.pth']
    with pytest.raises(SystemExit) as exit_:
        load_tool(tool)([str(path), *weights])
    assert exit_.value.code == 2
    assert 'none of metainfo.classes' in capsys.readouterr().err
    with pytest.raises(KeyError, match='NoSuchModel'):
        load_tool(tool)([str(path), *weights, '--skip-data-check'])
