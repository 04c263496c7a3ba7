"""For every way to load a checkpoint: those of other networks are refused, the right one loads.

mmengine loads what fits and logs the rest. A detector with a static checkpoint, or one of another
attention, was tested with half of its layers at random; the tool reported AP 0.000 and exit status
0.
"""
import copy
import functools
import importlib.util
import itertools
import re
from pathlib import Path

import pytest
import torch
from mmdet.apis import DetInferencer, init_detector
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner import checkpoint as mmengine_checkpoint
from mmseg.apis import MMSegInferencer, init_model

from kw_mm.datasets import write_shapes
from kw_mm.engine.inference import Predictor
from kw_mm.engine.local_training import use_shapes
from kw_mm.layers.loading import CheckpointMismatch

ROOT = Path(__file__).parents[2]
# Runners of one name that start in the same second share a logger, whose output may be closed.
NAMES = (f'loading{i}' for i in itertools.count())
CONFIGS = dict(det='mask-rcnn_kw1x-r18_fpn_shapes.py', seg='fpn_kw1x-r18_shapes.py')
# By name: the differences from the config, and the error.
OTHERS = dict(
    static=({'backbone.static': True, 'backbone.kw_cfg': None}, 'static2kw.py'),
    reduction=({'backbone.kw_cfg.reduction': 0.75}, 'backbone .*set kw_cfg'),
    bare=({}, r"has nothing for 'backbone'.*its keys begin with .*conv1, .*layer1.*Pretrained"),
    head=({}, r"has nothing for 'backbone'"))


@pytest.fixture(autouse=True, scope='module')
def scope():
    """Resets the default scope for the tests of other files."""
    with DefaultScope.overwrite_default_scope('mmengine'), pytest.MonkeyPatch.context() as patch:
        # Runners lay out their config three times, which takes most of their time.
        for module in ('mmengine.config.config', 'yapf.yapflib.yapf_api'):
            patch.setattr(f'{module}.FormatCode', lambda text, **kwargs: (text, True))
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp('shapes'), num_train=2, num_val=1, size=64)


@functools.cache
def read(kind, root):
    path = str(ROOT / 'configs' / 'demo' / CONFIGS[kind])
    cfg = Config.fromfile(path)
    cfg.merge_from_dict(use_shapes(root, path))
    return cfg


def config(kind, data, **changes):
    cfg = copy.deepcopy(read(kind, str(data.root)))
    widths = [8, 16, 32, 64]
    cfg.merge_from_dict({'model.backbone.base_channels': 8, 'train_dataloader.batch_size': 2,
                         'model.neck.in_channels': widths[:len(cfg.model.neck.in_channels)]})
    cfg.merge_from_dict({f'model.{name}': value for name, value in changes.items()
                         if value is not None})
    for name, value in changes.items():
        if value is None:
            cfg.model.backbone.pop(name.partition('.')[2])
    cfg.work_dir = str(Path(data.root) / 'work')
    cfg.experiment_name = next(NAMES)
    return cfg


def build(cfg):
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    return MODELS.build(cfg.model)


@pytest.fixture(scope='module')
def files(data):
    """Checkpoints of the right model, of parts of it, and of others."""
    paths = {}
    for kind in CONFIGS:
        states = {name: build(config(kind, data, **changes)).state_dict()
                  for name, (changes, _) in OTHERS.items()}
        whole = build(config(kind, data)).state_dict()
        states.update(
            right=whole,
            bare={k[len('backbone.'):]: v for k, v in whole.items() if k.startswith('backbone.')},
            head={k: v for k, v in whole.items() if not k.startswith('backbone.')},
            ddp={f'module.{k}': v for k, v in whole.items()})
        for name, state in states.items():
            paths[kind, name] = str(Path(data.root) / f'{kind}_{name}.pth')
            torch.save(dict(state_dict=state, message_hub={}, meta=dict(
                epoch=1, iter=1, dataset_meta=dict(classes=('a', 'b', 'c', 'd'), palette=None))),
                paths[kind, name])
    return paths


def runner(cfg, **changes):
    cfg.merge_from_dict(changes)
    return Runner.from_cfg(cfg)


WAYS = dict(
    load_from=lambda cfg, file: runner(cfg, load_from=file).load_or_resume(),
    resume=lambda cfg, file: runner(cfg, load_from=file, resume=True).load_or_resume(),
    init_cfg=lambda cfg, file: build_with(cfg, 'init_cfg', checkpoint=file),
    load_checkpoint=lambda cfg, file: load_checkpoint(build(cfg), file),
    predictor=lambda cfg, file: Predictor(cfg, file, 'cpu'))
DET_WAYS = dict(
    WAYS, inferencer=lambda cfg, file: DetInferencer(cfg, file, 'cpu'),
    init_detector=lambda cfg, file: init_detector(cfg, file, device='cpu'))
SEG_WAYS = dict(
    load_from=WAYS['load_from'], predictor=WAYS['predictor'],
    inferencer=lambda cfg, file: MMSegInferencer(cfg, file, device='cpu'),
    init_model=lambda cfg, file: init_model(cfg, file, device='cpu'))
ALL_WAYS = [(kind, way) for kind, ways in (('det', DET_WAYS), ('seg', SEG_WAYS)) for way in ways]


def build_with(cfg, key, **pretrained):
    cfg.model[key] = dict(type='Pretrained', **pretrained)
    model = build(cfg)
    model.init_weights()
    return model


@pytest.mark.parametrize('kind, way', ALL_WAYS)
def test_others_are_refused_and_the_right_one_is_not(data, files, kind, way):
    load = dict(det=DET_WAYS, seg=SEG_WAYS)[kind][way]
    for name, (_, message) in OTHERS.items() if way == 'load_checkpoint' else [
            ('static', OTHERS['static']), ('bare', OTHERS['bare'])]:
        with pytest.raises(CheckpointMismatch, match=message):
            load(config(kind, data), files[kind, name])
    if way != 'resume':  # resuming also loads what training needs
        load(config(kind, data), files[kind, 'ddp'])


@pytest.mark.parametrize('name', ['static', 'reduction', 'head'])
def test_init_cfg_of_the_backbone(data, files, name):
    expected = 'backbone. is not in the pretrained model' if name == 'head' else OTHERS[name][1]
    for prefix in (None, 'backbone.') if name != 'head' else ('backbone.',):
        cfg = config('det', data)
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=files['det', name],
                                           prefix=prefix)
        # Without the prefix a whole detector is loaded into a backbone.
        with pytest.raises((CheckpointMismatch, AssertionError),
                           match=expected.replace('backbone .*', '') if prefix else
                           'unknown: .*backbone.conv1.weight'):
            build(cfg).init_weights()
    cfg.model.backbone.init_cfg.checkpoint = files['det', 'right']
    model = build(cfg)
    torch.nn.init.zeros_(model.backbone.conv1.weight)
    model.init_weights()
    assert model.backbone.conv1.weight.abs().sum() > 0


def test_heads_of_other_classes_stay_out(data, files, monkeypatch):
    said = []
    monkeypatch.setattr('kw_mm.compat.print_log', lambda line, **kwargs: said.append(line))
    cfg = config('det', data, **{'roi_head.bbox_head.num_classes': 2})
    run = runner(cfg, load_from=files['det', 'right'])
    run.load_or_resume()
    assert said == ['These have other shapes in the checkpoint, as with another number of classes, '
                    'and stay as they were initialised: roi_head.bbox_head.fc_cls']
    loaded = torch.load(files['det', 'right'])['state_dict']
    state = run.model.state_dict()
    assert [key for key in loaded if not torch.equal(loaded[key], state[key])] == [
        'roi_head.bbox_head.fc_cls.weight', 'roi_head.bbox_head.fc_cls.bias']
    # But it is refused for testing.
    with pytest.raises(CheckpointMismatch, match='size mismatch for roi_head.bbox_head.fc_cls'):
        Predictor(cfg, files['det', 'right'], 'cpu')


def test_a_dynamic_head_that_is_new_stays_as_it_was_initialised(data, files, monkeypatch):
    said = []
    monkeypatch.setattr('kw_mm.compat.print_log', lambda line, **kwargs: said.append(line))
    neck = dict(conv_cfg=dict(type='KWConv2d'))
    cfg = config('det', data)
    cfg.model.neck.update(neck)
    state = torch.load(files['det', 'right'])['state_dict']
    with pytest.raises(CheckpointMismatch, match='neck.lateral_convs.0.conv .*static2kw.py'):
        mmengine_checkpoint.load_state_dict(build(cfg), state)
    state = {key: value for key, value in state.items() if 'neck' not in key}
    mmengine_checkpoint.load_state_dict(build(cfg), state)
    assert said == ['The checkpoint has nothing for these, which stay as they were initialised: '
                    '8 parts: ' + ', '.join([
                        *(f'neck.lateral_convs.{i}.conv' for i in range(4)),
                        *(f'neck.fpn_convs.{i}.conv' for i in range(2)), '...'])]


def test_a_model_with_nothing_in_common(data):
    model = torch.nn.Sequential()
    model.add_module('first', MODELS.build(dict(type='KWConv2d', in_channels=4, out_channels=4,
                                                kernel_size=3)))
    with pytest.raises(CheckpointMismatch, match="has nothing for 'first'.*begin with other"):
        mmengine_checkpoint.load_state_dict(model, {'other.weight': torch.zeros(1)})
    # Models without KW layers are not checked.
    mmengine_checkpoint.load_state_dict(torch.nn.Linear(2, 2), {'other.weight': torch.zeros(1)})


def test_the_moving_average(data, files):
    cfg = config('det', data)
    cfg.custom_hooks = [dict(type='EMAHook')]
    for resume in (False, True):
        run = runner(cfg, resume=resume)
        run.call_hook('before_run')
        state = torch.load(files['det', 'right'])['state_dict']
        ema = {f'module.{key}': value.clone() for key, value in state.items()}
        torch.save(dict(state_dict=state, ema_state_dict=dict(ema, steps=torch.tensor(3)), meta={}),
                   files['det', 'right'] + '.ema')
        run.load_checkpoint(files['det', 'right'] + '.ema')
        ema_model = run.hooks[-1].ema_model if hasattr(run.hooks[-1], 'ema_model') else next(
            hook.ema_model for hook in run.hooks if hasattr(hook, 'ema_model'))
        assert all(torch.equal(value, state[key])
                   for key, value in ema_model.module.state_dict().items())
        with pytest.raises(CheckpointMismatch):
            run.load_checkpoint(files['det', 'static'])


@pytest.fixture
def tool(monkeypatch, data, tmp_path, capsys):
    """Runs a tool that is to fail and returns what it wrote to stderr."""
    def run(name, cfg, *args):
        spec = importlib.util.spec_from_file_location(f'{name}_', ROOT / 'tools' / f'{name}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        cfg.dump(str(tmp_path / 'config.py'))
        with pytest.raises(SystemExit) as exit_:
            module.main([str(tmp_path / 'config.py'), *map(str, args)])
        assert exit_.value.code == 2
        return capsys.readouterr().err

    monkeypatch.chdir(tmp_path)
    return run


@pytest.mark.parametrize('name', ['static', 'reduction', 'bare', 'head'])
def test_the_test_tool(data, files, tool, name):
    # The exit status was 0, with AP 0.000 in the log.
    said = tool('test', config('det', data), files['det', name])
    assert re.search(OTHERS[name][1], said)


@pytest.mark.parametrize('kind', CONFIGS)
def test_the_test_tool_refuses_a_kw_checkpoint_for_a_static_model(data, files, tool, kind):
    # "The testing results of the whole dataset is empty", and exit status 0.
    static = config(kind, data, **OTHERS['static'][0])
    said = tool('test', static, files[kind, 'right'])
    assert 'checkpoint is that of a KW network and this one is static' in said
    static.model.backbone = dict(type='ResNet', depth=18, base_channels=8)
    if kind == 'seg':
        static.model.backbone.update(num_stages=3, strides=(1, 2, 2), dilations=(1, 1, 1),
                                     out_indices=(0, 1, 2))
    said = tool('test', static, files[kind, 'right'])
    assert 'unexpected key' in said and 'trained, that of a KW network' in said
    assert len(said) < 3000


def test_the_test_tool_is_strict_in_everything(data, files, tool):
    said = tool('test', config('det', data, **{'roi_head.bbox_head.num_classes': 2}),
                files['det', 'right'])
    assert 'size mismatch for roi_head.bbox_head.fc_cls' in said


def test_other_tools(data, files, tool):
    cfg = config('det', data)
    image = next(data.images('val').iterdir())
    assert 'static2kw.py' in tool('infer', cfg, files['det', 'static'], image)
    assert 'static2kw.py' in tool('train', cfg, '--cfg-options',
                                  f'load_from={files["det", "static"]}')
    assert 'static2kw.py' in tool('train', cfg, '--resume', files['det', 'static'])
    other = config('det', data, **{'roi_head.bbox_head.num_classes': 2})
    assert 'size mismatch' in tool('train', other, '--resume', files['det', 'right'])
