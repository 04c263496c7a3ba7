"""tools/analysis_tools/compare_static_start.py: its runs, what it keeps, and errors."""
import importlib.util
import json
from pathlib import Path

import pytest

TOOL = Path(__file__).parents[2] / 'tools' / 'analysis_tools' / 'compare_static_start.py'


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """The tool with trainings and tests that take no time."""
    spec = importlib.util.spec_from_file_location('compare_static_start', TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.trained = []

    def train(_, config, work_dir, changes):
        seed, start = changes['randomness.seed'], changes.get('model.init_cfg.checkpoint')
        module.trained.append((Path(config).stem, seed, start))
        return str(Path(work_dir, 'epoch_1.pth'))

    monkeypatch.setattr(module, 'write_shapes', lambda *args, **kwargs: None)
    monkeypatch.setattr(module, 'find_trained', lambda work_dir, epochs: None)
    monkeypatch.setattr(module, 'train_locally', train)
    monkeypatch.setattr(module, 'convert', lambda name, static, folder: f'{name}.pth')
    module.figures = {'r18_start': 0.5, 'kw1x-r18_start': 0.5}
    monkeypatch.setattr(module, 'test', lambda args, config, checkpoint, work_dir: dict.fromkeys(
        module.METRICS, module.figures.get(Path(work_dir).name, 0.6)))
    module.run = lambda *args: module.main(['--work-dir', str(tmp_path), *args])
    return module


def test_every_seed_is_tuned_from_one_start(tool, tmp_path, capsys):
    tool.figures['kw1x-r18_seed1'] = 0.75
    tool.run('--seeds', '0', '1')
    static = str(tmp_path / 'static' / 'epoch_1.pth')
    assert tool.trained == [
        ('mask-rcnn_r18_fpn_shapes', 0, None),
        ('mask-rcnn_r18_fpn_finetune-shapes', 0, static),
        ('mask-rcnn_r18_fpn_finetune-shapes', 1, static),
        ('mask-rcnn_kw1x-r18_fpn_finetune-shapes', 0, 'kw1x-r18.pth'),
        ('mask-rcnn_kw1x-r18_fpn_finetune-shapes', 1, 'kw1x-r18.pth')]
    assert '0.675 (0.600..0.750)' in capsys.readouterr().out
    results = json.loads((tmp_path / 'results.json').read_text())
    assert results['seeds'] == [0, 1]
    assert [r['box AP'] for r in results['kw1x-r18']] == [0.5, 0.6, 0.75]


def test_a_start_that_loses_something_is_an_error(tool):
    tool.figures['kw1x-r18_start'] = 0.498
    with pytest.raises(SystemExit, match='kw1x-r18 starts 0.0020 AP from the static detector'):
        tool.run('--seeds', '0')
