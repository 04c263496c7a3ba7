"""Comparisons: what is refused before anything is trained, what is kept, and what is reported."""
import copy
import json
import statistics
import subprocess
from pathlib import Path

import pytest
from mmengine.config import Config

from kw_mm.datasets import write_shapes
from kw_mm.engine import comparison
from kw_mm.engine.comparison import Arm, arms, processes, report, runs, widths
from kw_mm.engine.local_training import use_shapes

CONFIGS = Path(__file__).parents[2] / 'configs' / 'demo'
STATIC, KW = 'mask-rcnn_r18_fpn_shapes', 'mask-rcnn_kw1x-r18_fpn_shapes'


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('data') / 'shapes', 4, 2, size=64).root


@pytest.fixture
def configs(data):
    def load(name):
        path = str(CONFIGS / f'{name}.py')
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(use_shapes(str(data), path))
        return cfg

    return {name: load(name) for name in (STATIC, KW)}


def test_arms_are_written_and_equal_but_for_the_network(configs, tmp_path):
    static, kw = comparison.prepare_arms(configs, tmp_path)
    assert (static.name, kw.name) == (STATIC, KW)
    assert static.num_parameters < kw.num_parameters
    found = comparison.list_differences(Config.fromfile(static.path).to_dict(),
                                        Config.fromfile(kw.path).to_dict())
    assert {line.partition(':')[0] for line in found} == {
        'model.backbone.module.kw_cfg', 'model.backbone.module.static', 'custom_hooks'}


def test_the_same_folder_takes_the_same_arms_only(configs, tmp_path):
    comparison.prepare_arms(copy.deepcopy(configs), tmp_path)
    comparison.prepare_arms(copy.deepcopy(configs), tmp_path)
    configs[KW].optim_wrapper.optimizer.lr = 1
    with pytest.raises(ValueError, match='from a comparison with other settings; give another'):
        comparison.prepare_arms(configs, tmp_path)


@pytest.mark.parametrize('change, message', [
    ({'train_dataloader.batch_size': 7},
     f'{KW} must be trained and tested like {STATIC}, but differs in train_dataloader.batch_size: '
     r'6 \| 7'),
    ({'train_cfg.max_epochs': 9}, r'differs in train_cfg.max_epochs: 4 \| 9'),
    ({'model.backbone.depth': 19}, 'the model of .* cannot be built: .*depth')])
def test_arms_that_cannot_be_compared(configs, tmp_path, change, message):
    configs[KW].merge_from_dict(change)
    with pytest.raises(ValueError, match=message):
        comparison.prepare_arms(configs, tmp_path)
    assert not list(tmp_path.iterdir())


def test_missing_data_are_found_before_training(configs, tmp_path):
    for cfg in configs.values():
        cfg.merge_from_dict({'train_dataloader.dataset.data_root': 'nowhere/'})
    with pytest.raises(ValueError, match='data sets cannot be used(.|\n)*nowhere'):
        comparison.prepare_arms(configs, tmp_path)


def test_own_data(configs, data, tmp_path):
    own = json.loads((data / 'annotations' / 'instances_train.json').read_text())
    own['categories'] = own['categories'][:2]
    own['annotations'] = [a for a in own['annotations'] if a['category_id'] in {
        c['id'] for c in own['categories']}]
    path = tmp_path / 'own.json'
    path.write_text(json.dumps(own))
    cfg = configs[KW]
    comparison.use_own_data_(cfg, *[(str(path), str(data / 'train'))] * 2)
    assert cfg.model.roi_head.bbox_head.num_classes == cfg.model.roi_head.mask_head.num_classes == 2
    assert cfg.val_evaluator.ann_file == cfg.test_evaluator.ann_file == str(path)
    comparison.prepare_arms({KW: cfg}, tmp_path)

    for content, message in (('{}', "in COCO's format"), ('{"categories": []}', 'at least one')):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            comparison.use_own_data_(cfg, (str(path), str(data)), (str(path), str(data)))
    with pytest.raises(FileNotFoundError, match='annotation file none.json does not exist'):
        comparison.use_own_data_(cfg, ('none.json', str(data)), ('none.json', str(data)))
    with pytest.raises(FileNotFoundError, match='folder of images none does not exist'):
        comparison.use_own_data_(cfg, (str(path), 'none'), (str(path), str(data)))


def test_a_wider_network_has_as_many_parameters(configs):
    wanted = sum(p.numel() for p in arms.build_model(configs[KW]).parameters())
    wide = widths.widen(configs[STATIC], wanted)
    found = sum(p.numel() for p in arms.build_model(wide).parameters())
    assert abs(found / wanted - 1) < 0.05
    assert configs[STATIC].model.backbone.base_channels == 16
    for changed, field, value, message in (
            (copy.deepcopy(configs[STATIC]), 'init_cfg', dict(type='StaticPretrained'),
             'cannot start from weights'),
            (copy.deepcopy(configs[STATIC]), 'type', 'SwinTransformer', 'must be one of')):
        changed.model.backbone[field] = value
        with pytest.raises(ValueError, match=message):
            widths.widen(changed, wanted)
    with pytest.raises(ValueError, match='no wider one is closer to 1,000'):
        widths.widen(configs[STATIC], 1000)


class FakeTrainer:
    """Stands in for trainings and tests: writes a log, and a number is a checkpoint."""

    def __init__(self, failing=()):
        self.trained, self.started, self.failing, self.metrics = [], [], failing, {}

    def train(self, config, work_dir, changes):
        run = Path(config).stem, changes['randomness.seed']
        self.trained.append(run)
        self.started.append(changes.get('model.init_cfg.checkpoint'))
        if run in self.failing:
            raise RuntimeError('too small')
        scalars = work_dir / '20260101' / 'vis_data' / 'scalars.json'
        scalars.parent.mkdir(parents=True, exist_ok=True)
        scalars.write_text('\n'.join([
            json.dumps(dict(loss=9.0, time=0.5, step=1)),
            json.dumps(dict(loss=2.0, time=0.3, step=1, start_part=0.9)),
            json.dumps(dict(loss=1.0, time=0.1, step=2)), '{"loss": 0',
            json.dumps({'coco/bbox_mAP': 0.1, 'step': 1}),
            json.dumps({'coco/bbox_mAP': 0.2, 'step': 2})]))
        return f'{run[0]}:{run[1]}', 2**30

    def test(self, config, checkpoint, work_dir):
        return {'coco/bbox_mAP': self.metrics.get(checkpoint, 0.5), 'coco/bbox_mAP_50': 0.9}


@pytest.fixture
def trainer():
    return FakeTrainer()


@pytest.fixture
def two_arms(tmp_path, configs):
    return [Arm(name, str(tmp_path / f'{name}.py'), cfg, 10 * len(name))
            for name, cfg in configs.items()]


def test_every_arm_is_trained_once_for_each_seed(two_arms, tmp_path, trainer):
    said = []
    found, failures = runs.run_all(two_arms, [0, 1], tmp_path, trainer, report=said.append)
    assert trainer.trained == [(STATIC, 0), (KW, 0), (STATIC, 1), (KW, 1)] and not failures
    assert said[0] == f'[1/4] {STATIC}, seed 0: training'
    assert said[1] == f'[1/4] {STATIC}, seed 0: coco/bbox_mAP 0.5'
    # Of a step that was repeated, the last line counts.
    assert found[0].seconds == statistics.median([0.3, 0.1]) and found[0].memory == 2**30
    assert found[0].curve == {
        'loss': [[1, 2.0], [2, 1.0]], 'start_part': [[1, 0.9]],
        'coco/bbox_mAP': [[1, 0.1], [2, 0.2]]}
    again, _ = runs.run_all(two_arms, [0, 1, 2], tmp_path, trainer)
    assert trainer.trained[4:] == [(STATIC, 2), (KW, 2)] and again[:4] == found


def test_a_run_that_fails_costs_itself_alone(two_arms, tmp_path, trainer):
    trainer.failing = {(KW, 0)}
    found, failures = runs.run_all(two_arms, [0, 1], tmp_path, trainer, jobs=2)
    assert [(run.arm, run.seed) for run in found] == [(STATIC, 0), (STATIC, 1), (KW, 1)]
    assert failures == [runs.Failure(KW, 0, 'too small')]
    text = report.write_report(tmp_path, two_arms, found, failures, {})
    assert f'## What failed\n\n* {KW}, seed 0: too small' in text
    # It is tried again when the tool is called again.
    trainer.failing = ()
    assert len(runs.run_all(two_arms, [0, 1], tmp_path, trainer)[0]) == 4


def test_the_start_is_tested_once_for_each_arm(two_arms, tmp_path, trainer):
    trainer.metrics['a.pth'] = 0.25
    found, _ = runs.run_all(two_arms, [0, 1], tmp_path, trainer, {STATIC: 'a.pth'})
    assert trainer.started == ['a.pth', None, 'a.pth', None]
    assert [run.start.get('coco/bbox_mAP') for run in found] == [0.25, None, 0.25, None]


def test_an_arm_that_starts_elsewhere_is_told(two_arms, tmp_path, trainer):
    starts = {STATIC: 'a.pth', KW: 'b.pth'}
    for value, told in ((0.4991, False), (0.498, True)):
        trainer.metrics['b.pth'] = value
        folder = tmp_path / str(value)
        folder.mkdir()
        found, _ = runs.run_all(two_arms, [0], folder, trainer, starts)
        text = report.write_report(folder, two_arms, found, [], {})
        assert (f'**{KW} starts -0.0020 from {STATIC}**' in text) == told


def test_the_report_by_hand(two_arms, tmp_path, trainer):
    for name, values in ((STATIC, (0.50, 0.52, 0.51)), (KW, (0.51, 0.55, 0.51))):
        trainer.metrics.update({f'{name}:{seed}': value for seed, value in enumerate(values)})
    found, _ = runs.run_all(two_arms, [0, 1, 2], tmp_path, trainer)
    text = report.write_report(tmp_path, two_arms, found, [], dict(commit='abc'))
    assert f'| {STATIC} | 0.5100 | 0.5000 | 0.5200 | 0.5100 |  |' in text
    # Differences 0.01, 0.03, 0: resampled means lie between the least and the largest.
    assert f'| {KW} | 0.5233 | 0.5100 | 0.5500 | 0.5100 | +0.0133 [+0.0000, +0.0300] |' in text
    assert f'| {10 * len(KW)} | 0.200 | 1,024 |' in text and '* commit: abc' in text
    assert 'model.backbone.static: True | None' in text and 'bbox_mAP_50' not in text
    assert (tmp_path / 'curves.png').stat().st_size > 1000
    results = json.loads((tmp_path / 'results.json').read_text())
    assert [run['metrics']['coco/bbox_mAP'] for run in results['runs']][:2] == [0.50, 0.51]


def test_processes_that_fail_say_why(tmp_path):
    (tmp_path / 'train.py').write_text('import sys\nprint(sys.argv[1:])\nint("a b")')
    (tmp_path / 'test.py').write_text('raise SystemExit(3)')
    trainer = processes.LocalTrainer(tmp_path, threads=1)
    with pytest.raises(RuntimeError, match=r'^ValueError: invalid literal .*\(see .*train.log\)'):
        trainer.train('config.py', tmp_path, {'randomness.seed': 1})
    assert "'--cfg-options', 'randomness.seed=1'" in (tmp_path / 'train.log').read_text()
    with pytest.raises(RuntimeError, match=r'test.py ended with 3, see .*test.log'):
        trainer.test('config.py', 'a.pth', tmp_path)


def test_who_comes_later_waits_for_what_a_killed_call_has_left(tmp_path):
    with processes.lock_folder(tmp_path) as lock:
        left = subprocess.Popen(['sleep', '0.5'], pass_fds=(lock,))
    said = []
    with processes.lock_folder(tmp_path, said.append):
        assert left.poll() is not None or left.wait(1) == 0
    assert 'waiting for another call' in said[0]


def test_the_interval():
    low, high = report.bootstrap_interval([0.01] * 5)
    assert low == pytest.approx(0.01) and high == pytest.approx(0.01)
    assert report.bootstrap_interval([1, 2, 3]) == report.bootstrap_interval([1, 2, 3])
    low, high = report.bootstrap_interval(list(range(101)))
    # Mean 50; the standard error of the mean is 29.15 / sqrt(101) = 2.9.
    assert low == pytest.approx(50 - 1.96 * 2.9, abs=0.3)
    assert high == pytest.approx(50 + 1.96 * 2.9, abs=0.3)
