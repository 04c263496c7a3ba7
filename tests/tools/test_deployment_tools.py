"""tools/deployment and kw2static.py: a file's own metrics are those of the model in PyTorch."""
import importlib.util
import json
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from optimised import randomise
from tensorrt_table import find_violations
from torch import nn

from kw_mm.datasets import write_shapes
from kw_mm.deploy import compare, export_model, load_model
from kw_mm.deploy.objects import Objects, match_objects
from kw_mm.export import ModelFile

ROOT = Path(__file__).parents[2]
SEGMENTOR = ROOT / 'configs/demo/fpn_kw1x-r18_shapes.py'
DETECTOR = ROOT / 'configs/demo/mask-rcnn_kw1x-r18_fpn_shapes.py'
SMALL = {SEGMENTOR: {'model.backbone.base_channels': 8, 'model.neck.in_channels': [8, 16, 32]},
         DETECTOR: {'model.backbone.base_channels': 8, 'model.neck.in_channels': [8, 16, 32, 64],
                    'model.test_cfg.rcnn.score_thr': 0.02}}


def tool(path):
    sys.path.insert(0, str((ROOT / path).parent))
    spec = importlib.util.spec_from_file_location(f'kw_{Path(path).stem}', ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.pop(0)
    return module


def prepare(tmp_path, config):
    """A small data set, a config of a small model for it, and a checkpoint of random weights."""
    root = write_shapes(tmp_path / 'shapes', num_train=4, num_val=4, size=96).root
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({**SMALL[config], **{f'{split}_dataloader.dataset.data_root': str(root)
                                             for split in ('train', 'val', 'test')}})
    if config == DETECTOR:
        cfg.merge_from_dict({f'{split}_evaluator.ann_file':
                             f'{root}/annotations/instances_val.json' for split in ('val', 'test')})
    path = tmp_path / 'small.py'
    cfg.dump(path)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmengine'):
        init_default_scope(cfg.default_scope)
        model = MODELS.build(cfg.model)
        model.init_weights()
    randomise(model.backbone)
    for name, layer in model.named_modules():
        if name.endswith(('conv_seg', 'fc_cls', 'rpn_cls')):
            nn.init.normal_(layer.weight, std=2 / layer.weight[0].numel()**0.5)
            nn.init.zeros_(layer.bias)
    classes = cfg.test_dataloader.dataset.metainfo.classes
    torch.save(dict(state_dict=model.state_dict(), meta=dict(
        dataset_meta=dict(classes=tuple(classes)))), tmp_path / 'random.pth')
    return path, tmp_path / 'random.pth', root


@pytest.mark.slow
def test_segmentor(tmp_path, capsys):
    config, checkpoint, root = prepare(tmp_path, SEGMENTOR)
    out = tmp_path / 'model.onnx'
    image = next((root / 'val').glob('*.jpg'))
    tool('tools/deployment/export.py').main(
        [str(config), str(checkpoint), '--to', 'onnx', '--out', str(out), '--verify', str(image)])
    assert capsys.readouterr().out.count('equals: batch') == 2
    assert not find_violations(onnx.load(out))
    found = tool('tools/deployment/test.py').main([str(config), str(out)])
    static = tool('tools/model_converters/kw2static.py')
    torch.manual_seed(0)
    static.main([str(config), str(checkpoint), str(tmp_path / 'static'), '--images',
                 str(root / 'train')])
    printed = capsys.readouterr().out
    assert 'kernels are means over 4 images' in printed
    # The same data set and metrics for the model in PyTorch, in the first column.
    row = next(line.split() for line in printed.splitlines() if line.split()[:1] == ['mIoU'])
    assert float(row[-2]) == pytest.approx(found['mIoU'], abs=0.05)  # of 100
    made = (tmp_path / 'static/config.py').read_text()
    assert "type='ResNet'" in made and 'KW' not in made and 'kw_mm' not in made
    figures = tmp_path / 'figures.json'
    tool('tools/analysis_tools/inspect_mixing.py').main(
        [str(config), str(checkpoint), str(root / 'train'), '--json', str(figures)])
    assert 'cost of fixing' in capsys.readouterr().out
    found = json.loads(figures.read_text())
    assert found['metrics']['mIoU'] == pytest.approx(float(row[-2]), abs=1e-4)
    assert found['fixed_metrics']['mIoU'] == pytest.approx(float(row[-1]), abs=1e-4)
    assert 0 < found['summary']['spread, median'] <= found['summary']['spread, most']
    tool('tools/deployment/runner.py').main([str(out), str(image)])
    assert '%' in capsys.readouterr().out
    broken = tmp_path / 'broken.onnx'
    broken.write_bytes(out.read_bytes()[:1000])
    for argv, message in [
            ([str(DETECTOR), str(out)], 'must be the file of a detector'),
            ([str(config), str(tmp_path / 'no.onnx')], 'does not exist'),
            ([str(config), str(checkpoint)], r'must end in .onnx or .xml'),
            ([str(config), str(out), '--cfg-options', 'model.type=Other'],
             'the model that the config has, Other, got one of EncoderDecoder'),
            ([str(config), str(out), '--cfg-options', 'model.backbone.type=ResNet'],
             'the backbone that the config has, ResNet, got one of KWResNet'),
            ([str(config), str(broken)], 'must be a file that can be read')]:
        with pytest.raises(SystemExit):
            tool('tools/deployment/test.py').main(argv)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_detector(tmp_path, capsys):
    config, checkpoint, root = prepare(tmp_path, DETECTOR)
    out = tmp_path / 'model.onnx'
    cfg = Config.fromfile(config)
    model = load_model(cfg, str(checkpoint))
    form = export_model(model, cfg, out, 'onnx')
    assert all(c.equal for c in compare(ModelFile(out), form, model, cfg))
    assert not find_violations(onnx.load(out))
    from mmdet.apis import inference_detector
    run = tool('tools/deployment/runner.py').Runner(str(out))
    assert run.classes == list(model.dataset_meta['classes'])
    count = 0
    for path in sorted((root / 'val').glob('*.jpg')):
        expected = inference_detector(model, str(path)).pred_instances
        found = run(cv2.imread(str(path)))
        matching = match_objects(
            Objects(*(expected[name].numpy() for name in ('scores', 'bboxes', 'labels'))),
            Objects(*(found[name] for name in ('scores', 'boxes', 'labels'))), 96)
        assert matching.error < 1e-4
        assert not matching.only_expected and not matching.only_found
        assert found['masks'].shape == expected.masks.shape
        assert (found['masks'] != expected.masks.numpy()).mean() < 1e-3
        count += len(found['scores'])
    assert count > 10
    assert np.isfinite(list(tool('tools/deployment/test.py').main([str(config), str(out)]).values(
        ))).all()


@pytest.mark.slow
def test_check_and_latency(tmp_path, capsys):
    config, checkpoint, _ = prepare(tmp_path, SEGMENTOR)
    tool('tools/deployment/check.py').main([
        str(config), '--to', 'onnx', 'torchscript', '--cases', '1x64x96', '3x96x64', '--out-dir',
        str(tmp_path)])
    printed = capsys.readouterr().out
    assert printed.count('equals: batch') == 6 and 'differs' not in printed
    # Without a checkpoint its weights are others.
    out = str(tmp_path / 'small.onnx')
    tool('tools/deployment/latency.py').main([out, out, '--sizes', '64x96', '--rounds', '2'])
    assert '1x64x96' in capsys.readouterr().out
    for argv, message in [([out, '--sizes', '64'], 'HEIGHTxWIDTH'), (['no.onnx'], 'does not exist'),
                          ([out, '--runtime', 'torch'], 'runtime must be onnxruntime or openvino')]:
        with pytest.raises(SystemExit):
            tool('tools/deployment/latency.py').main(argv)
        assert message in capsys.readouterr().err


def test_what_cannot_be_exported_is_told(tmp_path, capsys):
    export = tool('tools/deployment/export.py')
    checkpoint = str(tmp_path / 'no.pth')
    for argv, message in [
            (['--to', 'onnx', '--out', 'x.onnx'], 'does not exist'),
            (['--to', 'onnx', '--out', 'x.pt2'], 'must end in .onnx'),
            (['--to', 'onnx', '--out', 'x.onnx', '--verify', str(ROOT / 'README.md')],
             'not an image that can be read'),
            (['--to', 'coreml', '--out', 'x'], 'invalid choice')]:
        with pytest.raises(SystemExit):
            export.main([str(SEGMENTOR), checkpoint, *argv])
        assert message in capsys.readouterr().err
