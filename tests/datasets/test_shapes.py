"""The shapes data set: images, annotations, the folder, and loading by mmdet and mmseg."""
from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from kw_mm.datasets import SHAPE_CLASSES, ShapeInstance, describe_shapes, draw_scene, write_shapes
from kw_mm.datasets.annotations import (
    encode_instance,
    mask_to_polygons,
    mask_to_rle,
    semantic_map,
)

ROOT = Path(__file__).parents[2]
TOOL = ROOT / 'tools' / 'dataset_converters' / 'make_shapes.py'
SIZE = (96, 80)
SEED = 5


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    root = tmp_path_factory.mktemp('shapes')
    return write_shapes(root, num_train=40, num_val=12, size=SIZE, seed=SEED)


def decode(segmentation, height, width):
    if isinstance(segmentation, list):
        rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    else:
        rle = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(rle).astype(bool)


def snapshot(root):
    return {path.relative_to(root).as_posix(): path.read_bytes()
            for path in Path(root).rglob('*') if path.is_file()}


def has_hole(mask):
    # A hole is background that is not connected to the frame.
    outside = np.pad(~mask, 1, constant_values=True).astype(np.uint8)
    return cv2.connectedComponents(outside, connectivity=4)[0] > 2


# -- one image ------------------------------------------------------------------------------


def test_same_arguments_same_scene():
    image, instances = draw_scene(1, 'train', 3, 64)
    # With other images in between, because no state is kept between calls.
    draw_scene(2, 'val', 9, 48)
    again, instances_again = draw_scene(1, 'train', 3, (64, 64))
    assert np.array_equal(image, again)
    assert [i.label for i in instances] == [i.label for i in instances_again]
    assert all(np.array_equal(a.mask, b.mask) for a, b in zip(instances, instances_again))


def test_seed_split_and_index_each_change_the_scene():
    scenes = [draw_scene(*key, 64)[0] for key in
              [(0, 'train', 0), (1, 'train', 0), (0, 'val', 0), (0, 'train', 1),
               # The words of a longer seed must not act as split and index.
               (2**32, 'train', 0), (2**64, 'train', 0)]]
    assert len({scene.tobytes() for scene in scenes}) == len(scenes)


@pytest.mark.parametrize('size', [128, (32, 48), (200, 40), 32])
def test_every_scene_is_sound(size):
    width, height = (size, size) if isinstance(size, int) else size
    for index in range(40):
        image, instances = draw_scene(0, 'train', index, size)
        assert image.shape == (height, width, 3) and image.dtype == np.uint8
        # Not a flat or saturated picture.
        assert image.std() > 3 and 10 < image.mean() < 245
        objects = [i for i in instances if not i.iscrowd]
        assert 1 <= len(objects) <= 6
        assert [i.iscrowd for i in instances] == sorted((i.iscrowd for i in instances),
                                                        reverse=True)
        assert sum(i.iscrowd for i in instances) <= 1
        assert sum(i.mask.astype(int) for i in instances).max() == 1
        assert min(i.mask.sum() for i in objects) >= 24
        assert all(0 <= i.label < len(SHAPE_CLASSES) for i in instances)


def test_scenes_are_varied():
    scenes = [draw_scene(0, 'train', index, 128)[1] for index in range(150)]
    objects = [i for scene in scenes for i in scene if not i.iscrowd]
    per_class = np.bincount([i.label for i in objects], minlength=len(SHAPE_CLASSES))
    assert per_class.min() > 0.5 * per_class.mean()

    sides = np.array([max(encode_instance(i)['bbox'][2:]) for i in objects])
    assert (sides < 25).mean() > 0.05
    assert (sides >= 14).mean() > 0.8
    assert (sides > 50).mean() > 0.1
    assert 0.05 < np.mean([scene[0].iscrowd for scene in scenes]) < 0.25
    assert 3 < len(objects) / len(scenes) < 5
    # Shapes do cover each other, so some masks of convex classes are not convex.
    convex = [i for i in objects if SHAPE_CLASSES[i.label] in ('circle', 'square', 'triangle')]
    solidity = []
    for instance in convex:
        hull = cv2.convexHull(np.argwhere(instance.mask).astype(np.int32))
        solidity.append(instance.mask.sum() / max(cv2.contourArea(hull), 1))
    assert 0.05 < np.mean(np.array(solidity) < 0.93) < 0.5


def test_colour_does_not_tell_the_class():
    # Mean colours of classes differ by chance only; with one colour per class it would be ~60.
    colours = [[] for _ in SHAPE_CLASSES]
    for index in range(150):
        image, instances = draw_scene(0, 'train', index, 64)
        for instance in instances:
            colours[instance.label].append(image[instance.mask].mean(0))
    means = np.array([np.mean(c, 0) for c in colours])
    assert np.abs(means - means.mean(0)).max() < 25


def test_classes_have_their_form():
    # For complete objects, (area / area of the hull, has a hole) is known for each class.
    solidity = {'circle': (0.9, 1.1), 'square': (0.9, 1.15), 'triangle': (0.9, 1.15),
                'ring': (0.55, 0.95)}
    seen = set()
    for index in range(120):
        _, instances = draw_scene(3, 'val', index, 128)
        union = sum(i.mask.astype(np.uint8) for i in instances)
        for instance in instances:
            mask = instance.mask.astype(np.uint8)
            near = cv2.dilate(mask, np.ones((5, 5), np.uint8))
            frame = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]]).any()
            alone = (near * union).sum() == mask.sum()
            if instance.iscrowd or frame or not alone or mask.sum() < 400:
                continue
            name = SHAPE_CLASSES[instance.label]
            hull = cv2.convexHull(np.argwhere(mask).astype(np.int32))
            low, high = solidity[name]
            assert low < mask.sum() / cv2.contourArea(hull) < high, (index, name)
            assert has_hole(instance.mask) == (name == 'ring'), (index, name)
            seen.add(name)
    assert seen == set(SHAPE_CLASSES)


@pytest.mark.parametrize('change, error, message', [
    (dict(split='test'), ValueError, r"split must be one of \('train', 'val'\), got 'test'"),
    (dict(index=-1), ValueError, 'index must be at least 0, got -1'),
    (dict(seed=-2), ValueError, 'seed must be at least 0, got -2'),
    (dict(seed=0.5), TypeError, 'seed must be an integer, got 0.5'),
    (dict(size=-64), ValueError, 'size must be at least 32, got -64'),
    (dict(size=(64, 8)), ValueError, 'height of size must be at least 32, got 8'),
    (dict(size=(64, 64, 3)), ValueError, r'size must be an integer or \(width, height\), got'),
    (dict(size='64'), TypeError, "size must be an integer, got '64'"),
])
def test_draw_scene_names_the_bad_argument(change, error, message):
    arguments = dict(seed=0, split='train', index=0, size=64)
    with pytest.raises(error, match=message):
        draw_scene(**{**arguments, **change})


# -- one annotation -------------------------------------------------------------------------


def test_polygon_by_hand():
    # An L of three pixels, at twice the size and a quarter pixel inside its outline.
    mask = np.array([[1, 0], [1, 1]], bool)
    (polygon,) = mask_to_polygons(mask, (10, 20))
    points = np.array(polygon).reshape(-1, 2)
    assert points.min(0).tolist() == [10.25, 20.25]
    assert points.max(0).tolist() == [11.75, 21.75]
    assert [10.75, 20.25] in points.tolist() and [11.75, 20.25] not in points.tolist()


def test_run_lengths_by_hand():
    # Columns (0 1 1), (1 0 0): one off, three on, two off.
    mask = np.array([[0, 1], [1, 0], [1, 0]], bool)
    assert mask_to_rle(mask) == dict(size=[3, 2], counts=[1, 3, 2])
    # The first run is always background.
    assert mask_to_rle(~mask) == dict(size=[3, 2], counts=[0, 1, 3, 2])


@pytest.mark.parametrize('picture, parts', [
    (['1'], 1),
    (['1111'], 1),
    (['10', '01'], 1),
    (['101', '101'], 2),
    (['11111', '10001', '10111'], 1),
    (['111', '101', '111'], None),
    # A gap that only opens diagonally is closed for COCO's 4-connected background.
    (['110', '101', '111'], None),
])
def test_annotation_decodes_to_the_mask(picture, parts):
    small = np.array([[c == '1' for c in row] for row in picture])
    for corner in ((0, 0), (3, 2), (9 - small.shape[0], 7 - small.shape[1])):
        mask = np.zeros((9, 7), bool)
        rows, columns = (slice(c, c + n) for c, n in zip(corner, small.shape))
        mask[rows, columns] = small
        fields = encode_instance(ShapeInstance(2, mask))
        if parts is None:
            assert isinstance(fields['segmentation'], dict)
        else:
            assert len(fields['segmentation']) == parts
        assert np.array_equal(decode(fields['segmentation'], 9, 7), mask)
        assert fields['area'] == small.sum()
        assert fields['bbox'] == [corner[1], corner[0], small.shape[1], small.shape[0]]
        assert fields['category_id'] == 3 and fields['iscrowd'] == 0


def test_label_map_by_hand():
    masks = np.eye(3, dtype=bool)[:, None]
    instances = [ShapeInstance(3, masks[0]), ShapeInstance(0, masks[2], iscrowd=True)]
    labels = semantic_map(instances)
    assert labels.dtype == np.uint8 and labels.tolist() == [[4, 0, 1]]


# -- the folder -----------------------------------------------------------------------------


def test_coco_files_agree_with_the_drawing(shapes):
    width, height = SIZE
    kinds = dict(polygon=0, hole=0, crowd=0)
    for split, num in (('train', 40), ('val', 12)):
        coco = COCO(str(shapes.annotations(split)))
        assert len(coco.imgs) == num
        assert [c['name'] for c in coco.loadCats(coco.getCatIds())] == list(SHAPE_CLASSES)
        assert 0 not in coco.anns
        for index, image_id in enumerate(sorted(coco.imgs)):
            info = coco.imgs[image_id]
            image, instances = draw_scene(SEED, split, index, SIZE)
            stored = cv2.imread(str(shapes.images(split) / info['file_name']))
            assert (info['width'], info['height']) == SIZE and stored.shape == image.shape
            # Equal up to JPEG's rounding. With red and blue swapped it would differ by 10 or more.
            assert np.abs(stored.astype(int) - image).mean() < 3

            annotations = coco.imgToAnns[image_id]
            assert len(annotations) == len(instances)
            for annotation, instance in zip(annotations, instances):
                mask = coco.annToMask(annotation).astype(bool)
                assert np.array_equal(mask, instance.mask)
                assert annotation['area'] == mask.sum()
                x, y, w, h = annotation['bbox']
                assert mask[y:y + h, x:x + w].sum() == mask.sum()
                assert mask[y].any() and mask[y + h - 1].any()
                assert mask[:, x].any() and mask[:, x + w - 1].any()
                assert coco.cats[annotation['category_id']]['name'] == SHAPE_CLASSES[
                    instance.label]
                assert annotation['iscrowd'] == instance.iscrowd
                is_rle = isinstance(annotation['segmentation'], dict)
                assert is_rle == (instance.iscrowd or has_hole(mask))
                kinds['crowd' if instance.iscrowd else 'hole' if is_rle else 'polygon'] += 1
    assert kinds['crowd'] >= 2 and kinds['hole'] >= 10
    assert kinds['polygon'] > 2 * kinds['hole']


def test_label_maps_agree_with_the_instances(shapes):
    for split, num in (('train', 40), ('val', 12)):
        maps = sorted(shapes.semantic_maps(split).iterdir())
        assert [m.stem for m in maps] == sorted(p.stem for p in shapes.images(split).iterdir())
        assert len(maps) == num
        coco = COCO(str(shapes.annotations(split)))
        for image_id, path in enumerate(maps, 1):
            labels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            assert labels.dtype == np.uint8 and labels.shape == SIZE[::-1]
            expected = np.zeros_like(labels)
            # A covered pixel belongs to the later object only, so the order of masks does not
            # matter.
            for annotation in reversed(coco.imgToAnns[image_id]):
                mask = coco.annToMask(annotation).astype(bool)
                assert not expected[mask].any()
                expected[mask] = annotation['category_id']
            assert np.array_equal(labels, expected)


def test_image_does_not_depend_on_the_number_of_images(shapes, tmp_path):
    fewer = write_shapes(tmp_path, num_train=3, num_val=2, size=SIZE, seed=SEED)
    for split, num in (('train', 3), ('val', 2)):
        names = sorted(os.listdir(fewer.images(split)))
        assert len(names) == num
        for name in names:
            assert (fewer.images(split) / name).read_bytes() == (
                shapes.images(split) / name).read_bytes()
        few, many = (json.loads(f.annotations(split).read_text())['annotations']
                     for f in (fewer, shapes))
        assert few == many[:len(few)] and many[len(few)]['image_id'] == num + 1


def test_splits_share_no_image(shapes):
    train, val = ({p.read_bytes() for p in shapes.images(s).iterdir()} for s in ('train', 'val'))
    assert len(train) == 40 and len(val) == 12 and not train & val


def test_complete_data_set_is_left_untouched(tmp_path):
    arguments = dict(num_train=2, num_val=1, size=32, seed=1)
    assert write_shapes(tmp_path, **arguments).written
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}
    assert not write_shapes(str(tmp_path), **arguments).written
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.rglob('*')}


def test_interrupted_writing_is_finished(tmp_path, monkeypatch):
    arguments = dict(num_train=4, num_val=2, size=32, seed=1)
    write_shapes(tmp_path / 'whole', **arguments)
    calls = []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return draw_scene(*args)

    with monkeypatch.context() as patch:
        patch.setattr('kw_mm.datasets.shapes.draw_scene', interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_shapes(tmp_path / 'half', **arguments)
    assert len(os.listdir(tmp_path / 'half' / 'train')) == 3
    assert not (tmp_path / 'half' / 'shapes.json').exists()
    assert write_shapes(tmp_path / 'half', **arguments).written
    assert snapshot(tmp_path / 'half') == snapshot(tmp_path / 'whole')


@pytest.mark.parametrize('lost', [
    'train/000001.jpg', 'annotations/instances_val.json', 'annotations/semantic_val/000000.png'])
def test_lost_file_comes_back(tmp_path, lost):
    arguments = dict(num_train=2, num_val=1, size=32)
    write_shapes(tmp_path, **arguments)
    before = snapshot(tmp_path)
    (tmp_path / lost).unlink()
    assert write_shapes(tmp_path, **arguments).written
    assert snapshot(tmp_path) == before


def test_a_data_set_from_before_there_were_label_maps_gets_them(tmp_path):
    arguments = dict(num_train=2, num_val=1, size=32)
    write_shapes(tmp_path, **arguments)
    whole = snapshot(tmp_path)
    for split in ('train', 'val'):
        shutil.rmtree(tmp_path / 'annotations' / f'semantic_{split}')
    assert write_shapes(tmp_path, **arguments).written
    assert snapshot(tmp_path) == whole


def test_what_a_kill_or_a_failing_power_supply_leaves_is_mended(tmp_path):
    arguments = dict(num_train=2, num_val=1, size=32)
    write_shapes(tmp_path, **arguments)
    whole = snapshot(tmp_path)
    (tmp_path / 'train' / '000001.jpg').write_bytes(b'')
    for name in ('train/.000001.jpg.0.unfinished', 'annotations/.instances_val.json.0.unfinished',
                 '.shapes.json.0.unfinished'):
        (tmp_path / name).write_text('half')
    assert write_shapes(tmp_path, **arguments).written
    assert snapshot(tmp_path) == whole


@pytest.mark.parametrize('interrupted', [False, True])
def test_other_parameters_are_refused_and_overwritten_on_demand(tmp_path, interrupted):
    write_shapes(tmp_path, num_train=4, num_val=1, size=32, seed=1)
    if interrupted:
        (tmp_path / 'shapes.json').rename(tmp_path / 'shapes.unfinished.json')
    (tmp_path / 'train' / 'mine.txt').write_text('stays')
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match='num_train is 4, asked for 2; seed is 1, asked for 3'):
        write_shapes(tmp_path, num_train=2, num_val=1, size=32, seed=3)
    with pytest.raises(ValueError, match=r'another folder, or overwrite it \(overwrite=True'):
        write_shapes(tmp_path, num_train=4, num_val=1, size=(32, 33), seed=1)
    assert snapshot(tmp_path) == before

    arguments = dict(num_train=2, num_val=1, size=32, seed=3)
    assert write_shapes(tmp_path, overwrite=True, **arguments).written
    write_shapes(tmp_path / 'fresh', **arguments)
    after = {k: v for k, v in snapshot(tmp_path).items() if not k.startswith('fresh/')}
    assert after.pop('train/mine.txt') == b'stays'
    # No image of the larger data set is left.
    assert after == snapshot(tmp_path / 'fresh')


@pytest.mark.parametrize('overwrite', [False, True])
def test_foreign_data_set_is_never_touched(tmp_path, overwrite):
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'instances_train.json').write_text('{}')
    with pytest.raises(ValueError, match="'annotations' that is not of a shapes data set"):
        write_shapes(tmp_path, 1, 1, 32, overwrite=overwrite)
    assert snapshot(tmp_path) == {'annotations/instances_train.json': b'{}'}


@pytest.mark.parametrize('arguments, message', [
    (dict(num_train=0), 'num_train must be at least 1, got 0'),
    (dict(num_val=-3), 'num_val must be at least 1, got -3'),
    (dict(size=(-64, 64)), 'width of size must be at least 32, got -64'),
    (dict(seed=-1), 'seed must be at least 0, got -1'),
])
def test_write_shapes_names_the_bad_argument(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_shapes(tmp_path / 'none', **arguments)
    assert not (tmp_path / 'none').exists()


def test_root_that_is_a_file(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(ValueError, match='root must be a folder'):
        write_shapes(tmp_path / 'file', 1, 1, 32)


def test_unreadable_record(tmp_path):
    (tmp_path / 'shapes.json').write_text('[1')
    with pytest.raises(ValueError, match='does not hold the parameters'):
        write_shapes(tmp_path, 1, 1, 32)
    assert write_shapes(tmp_path, 1, 1, 32, overwrite=True).written


def test_progress_goes_to_stderr_only_when_asked(tmp_path, capsys):
    write_shapes(tmp_path / 'a', 2, 1, 32)
    assert capsys.readouterr() == ('', '')
    write_shapes(tmp_path / 'b', 2, 1, 32, progress=True)
    out, err = capsys.readouterr()
    assert out == '' and '3/3' in err and 'ETA' in err


# -- the command line -----------------------------------------------------------------------


@pytest.fixture
def run_tool(monkeypatch, capsys):
    def run(*options):
        # In this process, because importing the package takes seconds. The tool's folder comes
        # first in the path, as for a script.
        with monkeypatch.context() as patch:
            patch.setattr(sys, 'argv', [str(TOOL), *map(str, options)])
            patch.syspath_prepend(TOOL.parent)
            runpy.run_path(str(TOOL), run_name='__main__')
        return capsys.readouterr().out.splitlines()

    return run


def test_tool_writes_and_reports(tmp_path, monkeypatch, run_tool):
    monkeypatch.chdir(tmp_path)
    options = ['made', '--num-train', 3, '--num-val', 2, '--size', '48x32', '--seed', 4]
    printed = run_tool(*options)
    files = write_shapes(tmp_path / 'made', 3, 2, (48, 32), 4)
    assert not files.written
    assert printed == [*describe_shapes(files).splitlines(), 'written to made']
    assert run_tool(*options)[-1] == 'already complete, left as it is: made'


@pytest.mark.parametrize('options, message', [
    (('--size', '48xx32'), "got '48xx32'"),
    (('--size', '8'), 'size must be at least 32, got 8'),
    (('--num-train', 3), 'num_val is 2, asked for 200'),
])
def test_tool_reports_mistakes(tmp_path, run_tool, capsys, options, message):
    write_shapes(tmp_path, 3, 2, 128)
    with pytest.raises(SystemExit) as exit_:
        run_tool(tmp_path, *options)
    assert exit_.value.code == 2 and message in capsys.readouterr().err


def test_tool_overwrites(tmp_path, run_tool):
    write_shapes(tmp_path, 3, 2, 32)
    run_tool(tmp_path, '--num-train', 1, '--num-val', 1, '--size', 32, '--overwrite')
    assert os.listdir(tmp_path / 'train') == ['000000.jpg']


def test_description_counts(shapes):
    rows = {line.split()[0]: line.split()[1:] for line in describe_shapes(shapes).splitlines()[1:]}
    scenes = [draw_scene(SEED, 'val', index, SIZE)[1] for index in range(12)]
    objects = [SHAPE_CLASSES[i.label] for scene in scenes for i in scene if not i.iscrowd]
    assert rows['images'] == ['40', '12']
    assert {name: rows[name][1] for name in SHAPE_CLASSES} == {
        name: str(objects.count(name)) for name in SHAPE_CLASSES}
    assert rows['crowds'][1] == str(sum(i.iscrowd for scene in scenes for i in scene))


# -- MMDetection ----------------------------------------------------------------------------


def test_stock_mmdet_loads_it(shapes):
    from mmdet.datasets import CocoDataset
    from mmengine.registry import DefaultScope

    # The scope is reset, so that tests of MMSegmentation are not affected.
    with DefaultScope.overwrite_default_scope('mmdet'):
        dataset = CocoDataset(
            data_root=str(shapes.root),
            ann_file='annotations/instances_train.json',
            data_prefix=dict(img='train/'),
            metainfo=dict(classes=SHAPE_CLASSES),
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=[
                dict(type='LoadImageFromFile'),
                dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
            ])
    assert len(dataset) == 40
    seen = set()
    for index in range(40):
        result = dataset[index]
        image, instances = draw_scene(SEED, 'train', index, SIZE)
        assert np.abs(result['img'].astype(int) - image).mean() < 3
        assert result['gt_bboxes_labels'].tolist() == [i.label for i in instances]
        assert result['gt_ignore_flags'].tolist() == [i.iscrowd for i in instances]
        boxes = result['gt_bboxes'].tensor.tolist()
        assert len(result['gt_masks'].masks) == len(instances)
        for mask, box, instance in zip(result['gt_masks'].masks, boxes, instances):
            assert np.array_equal(mask.astype(bool), instance.mask)
            rows, columns = np.nonzero(instance.mask)
            assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            seen.add((instance.iscrowd, has_hole(instance.mask)))
    assert {(False, False), (False, True)} <= seen and any(crowd for crowd, _ in seen)


# -- MMSegmentation -------------------------------------------------------------------------


def test_stock_mmseg_loads_it(shapes):
    from mmengine.config import Config
    from mmengine.registry import DefaultScope
    from mmseg.registry import DATASETS

    cfg = Config.fromfile(ROOT / 'configs' / '_base_' / 'datasets' / 'shapes_semantic.py')
    assert cfg.metainfo.classes == ('background', *SHAPE_CLASSES)
    for split, num in (('train', 40), ('val', 12)):
        loader = cfg[f'{split}_dataloader']
        loader.dataset.data_root = str(shapes.root)
        loader.dataset.pipeline = [t for t in loader.dataset.pipeline if t.type != 'RandomFlip']
        with DefaultScope.overwrite_default_scope('mmseg'):
            dataset = DATASETS.build(loader.dataset)
        assert len(dataset) == num
        for index in range(0, num, 5):
            sample = dataset[index]['data_samples']
            instances = draw_scene(SEED, split, index, SIZE)[1]
            assert Path(sample.img_path).name == f'{index:06d}.jpg'
            labels = sample.gt_sem_seg.data.squeeze(0).numpy()
            assert np.array_equal(labels, semantic_map(instances))
