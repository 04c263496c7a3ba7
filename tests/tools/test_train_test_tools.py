"""How options of tools/train.py and tools/test.py change a config, and their errors."""
import importlib.util
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook

from kw_mm.datasets import Findings
from kw_mm.engine import launch

TOOLS = Path(__file__).parents[2] / 'tools'

DET = """
default_scope = 'mmdet'
model = dict(type='MaskRCNN')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = dict(visualization=dict(type='DetVisualizationHook'))
visualizer = dict(type='DetLocalVisualizer')
test_dataloader = dict(dataset=dict(type='Concat', dataset=dict(type='CocoDataset', pipeline=[
    dict(type='LoadImageFromFile'), dict(type='PackDetInputs', meta_keys=('img_id',))])))
test_evaluator = dict(type='CocoMetric')
"""
SEG = """
default_scope = 'mmseg'
model = dict(type='EncoderDecoder')
default_hooks = dict(visualization=dict(type='SegVisualizationHook'))
visualizer = dict(type='SegLocalVisualizer')
test_dataloader = dict(dataset=dict(pipeline=[dict(type='LoadImageFromFile')]))
test_evaluator = [dict(type='IoUMetric'), dict(type='CityscapesMetric')]
"""
SEG_TTA = SEG + """
tta_model = dict(type='SegTTAModel')
tta_pipeline = [dict(type='TestTimeAug')]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory with three configs and a checkpoint."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('LOCAL_RANK', '0')
    for name, text in (('det', DET), ('seg', SEG), ('seg_tta', SEG_TTA)):
        (tmp_path / f'{name}.py').write_text(text)
    torch.save(dict(state_dict={}, meta={}, message_hub={}), 'whole.pth')
    torch.save(dict(state_dict=dict(w=torch.zeros(999)), meta={}), 'weights.pth')
    return tmp_path


@pytest.fixture
def run(monkeypatch):
    """Runs a tool up to its runner and returns the config that the runner gets."""
    def run(tool, *argv):
        spec = importlib.util.spec_from_file_location(f'{tool}_tool', TOOLS / f'{tool}.py')
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        calls = []

        class Runner:
            def __init__(self, cfg):
                self.cfg = cfg
                self.model = torch.nn.Module()
                self.work_dir = cfg.work_dir
                self.hooks = [EMAHook()]
                self._resume, self._load_from = cfg.get('resume'), cfg.get('load_from')

            def train(self):
                self.cfg.initialised = not getattr(self.model, 'is_init', False)
                self.cfg.strict_average = self.hooks[0].strict_load
                self.cfg.resume, self.cfg.load_from = self._resume, self._load_from
                calls.append(self.cfg)

            def register_hook(self, hook):
                self.hooks.append(hook)

            def test(self):
                calls.append(self.cfg)

        monkeypatch.setattr(launch, 'build_runner', Runner)
        # The configs name no files; tests/datasets/test_checking.py has data.
        monkeypatch.setattr(launch, 'check_data', lambda *args: Findings())
        module.main([str(arg) for arg in argv])
        return calls[0]
    return run


@pytest.fixture
def error(run, capsys):
    """Runs a tool that is to fail and returns its last line."""
    def error(*argv):
        with pytest.raises(SystemExit) as exit_:
            run(*argv)
        assert exit_.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]
    return error


def cut(name):
    data = Path('weights.pth').read_bytes()
    Path(name).write_bytes(data[:len(data) // 2])
    return name


def test_train_defaults(run):
    cfg = run('train', 'det.py')
    assert cfg.work_dir == os.path.join('work_dirs', 'det')
    assert cfg.launcher == 'none'
    assert cfg.optim_wrapper.type == 'OptimWrapper' and not cfg.auto_scale_lr.enable
    assert cfg.get('resume') is None and cfg.get('load_from') is None


def test_cfg_options_and_work_dir(run):
    cfg = run('train', 'det.py', '--cfg-options', 'optim_wrapper.optimizer.lr=0.5',
              'work_dir=a', 'model.sizes=[1,2]', '--work-dir', 'b')
    assert cfg.optim_wrapper.optimizer.lr == 0.5 and cfg.model.sizes == [1, 2]
    assert cfg.work_dir == 'b'
    assert run('train', 'det.py', '--cfg-options', 'work_dir=a').work_dir == 'a'


def test_launcher_and_local_rank(run, monkeypatch):
    monkeypatch.delenv('LOCAL_RANK')
    assert run('train', 'det.py', '--launcher', 'pytorch', '--local-rank', 3).launcher == 'pytorch'
    assert os.environ['LOCAL_RANK'] == '3'
    run('test', 'det.py', 'weights.pth', '--local_rank=1')
    assert os.environ['LOCAL_RANK'] == '3'  # the launcher's value is kept


def test_amp(run, error, monkeypatch):
    monkeypatch.setattr(launch, 'has_accelerator', lambda: True)
    for options in ([], ['--cfg-options', 'optim_wrapper.type=AmpOptimWrapper']):
        assert run('train', 'det.py', '--amp', *options).optim_wrapper.type == 'AmpOptimWrapper'
    assert "to be 'OptimWrapper', which it replaces, got 'Mine'" in error(
        'train', 'det.py', '--amp', '--cfg-options', 'optim_wrapper.type=Mine')
    monkeypatch.setattr(launch, 'has_accelerator', lambda: False)
    assert '--amp needs a GPU or another accelerator' in error('train', 'det.py', '--amp')


def test_auto_scale_lr(run, error):
    assert run('train', 'det.py', '--auto-scale-lr').auto_scale_lr == dict(
        enable=True, base_batch_size=16)
    assert 'needs auto_scale_lr.base_batch_size' in error('train', 'seg.py', '--auto-scale-lr')


def test_resume(run):
    cfg = run('train', 'det.py', '--resume', 'whole.pth')
    assert (cfg.resume, cfg.load_from, cfg.initialised) == (True, 'whole.pth', False)
    assert cfg.strict_average
    cfg = run('train', 'det.py', '--cfg-options', 'load_from=https://host/weights.pth')
    assert (cfg.get('resume'), cfg.load_from) == (None, 'https://host/weights.pth')
    assert not cfg.strict_average


def test_resume_from_the_work_directory(run, folder, monkeypatch):
    said = []
    monkeypatch.setattr('kw_mm.crash_safety.print_log', lambda text, *args: said.append(text))
    # Nothing to resume from yet: a fresh start, as without --resume.
    cfg = run('train', 'det.py', '--resume')
    assert (cfg.resume, cfg.load_from, cfg.initialised) == (False, None, True)
    cfg = run('train', 'det.py', '--resume', '--cfg-options', 'load_from=weights.pth')
    assert (cfg.resume, cfg.load_from, cfg.initialised) == (False, 'weights.pth', True)
    assert not cfg.strict_average
    assert said[0].endswith('training starts from the beginning')
    assert said[1].endswith('starts from the beginning, with the weights of weights.pth')
    work_dir = folder / 'work_dirs' / 'det'
    work_dir.mkdir(parents=True)
    (work_dir / 'last_checkpoint').write_text(cut('cut.pth'))
    cfg = run('train', 'det.py', '--resume')
    assert (cfg.resume, cfg.load_from) == (False, None)
    assert "'cut.pth' is cut off" in said[2]
    path = os.path.join('work_dirs', 'det', 'epoch_1.pth')
    os.rename('whole.pth', path)
    cfg = run('train', 'det.py', '--resume', '--cfg-options', 'load_from=gone.pth')
    assert (cfg.resume, cfg.load_from, cfg.initialised) == (True, path, False)
    assert cfg.strict_average
    assert said[3].startswith(f'Resuming from {path}, the newest whole checkpoint; checkpoint ')


def test_resume_errors(error, folder):
    assert "checkpoint 'no.pth' does not exist" in error('train', 'det.py', '--resume', 'no.pth')
    assert "'cut.pth' is cut off" in error('train', 'det.py', '--resume', cut('cut.pth'))
    assert "'det.py' is cut off or no checkpoint" in error('train', 'det.py', '--resume', 'det.py')
    assert "'weights.pth' cannot be resumed from, it has no ['message_hub']" in error(
        'train', 'det.py', '--resume', 'weights.pth')
    data = bytearray(Path('weights.pth').read_bytes())
    data[len(data) // 2] ^= 1
    Path('damaged.pth').write_bytes(data)
    assert "'damaged.pth' is damaged" in error('train', 'det.py', '--resume', 'damaged.pth')
    assert "'cut.pth' is cut off" in error(
        'train', 'det.py', '--cfg-options', 'load_from=cut.pth')
    (folder / 'work_dirs' / 'det').mkdir(parents=True)
    os.rename('weights.pth', folder / 'work_dirs' / 'det' / 'epoch_1.pth')
    assert "nothing in 'work_dirs/det' can be resumed from" in error('train', 'det.py', '--resume')
    assert "checkpoint 'no.pth' does not exist" in error(
        'train', 'seg.py', '--resume', '--cfg-options', 'load_from=no.pth')


def test_a_full_disk_is_told_without_a_traceback(run, capsys, monkeypatch):
    def full(*args, **kwargs):
        raise launch.NotWrittenError("'epoch_1.pth' cannot be written: No space left on device")

    monkeypatch.setattr(torch.nn.Module, 'is_init', property(full), raising=False)
    with pytest.raises(SystemExit) as exit_:
        run('train', 'det.py')
    assert exit_.value.code == 1
    assert "error: 'epoch_1.pth' cannot be written: No space" in capsys.readouterr().err


def test_missing_config(error):
    assert "config 'no.py' does not exist" in error('train', 'no.py')
    assert "config 'no.py' does not exist" in error('test', 'no.py', 'weights.pth')


def test_test_defaults(run):
    cfg = run('test', 'det.py', 'weights.pth')
    assert cfg.load_from == 'weights.pth' and not cfg.resume
    assert cfg.model.type == 'MaskRCNN' and 'draw' not in cfg.default_hooks.visualization


def test_checkpoint_errors(error):
    assert "'cut.pth' is cut off" in error('test', 'det.py', cut('cut.pth'))
    assert "checkpoint 'no.pth' does not exist" in error('test', 'det.py', 'no.pth')


def test_drawing(run, error):
    hook = run('test', 'det.py', 'weights.pth', '--show', '--wait-time', 0.5
               ).default_hooks.visualization
    assert (hook.draw, hook.show, hook.wait_time) == (True, True, 0.5)
    hook = run('test', 'det.py', 'weights.pth', '--show-dir', 'pics').default_hooks.visualization
    assert (hook.draw, hook.get('show'), hook.test_out_dir) == (True, None, 'pics')
    cfg = run('test', 'seg.py', 'weights.pth', '--show-dir', 'pics')
    hook = cfg.default_hooks.visualization
    assert (hook.draw, hook.interval, cfg.visualizer.save_dir) == (True, 1, 'pics')
    assert 'need default_hooks.visualization and visualizer' in error(
        'test', 'det.py', 'weights.pth', '--show', '--cfg-options', 'visualizer=None')


def test_out(run, error):
    cfg = run('test', 'det.py', 'weights.pth', '--out', 'out.pkl')
    assert cfg.test_evaluator == [
        dict(type='CocoMetric'), dict(type='DumpDetResults', out_file_path='out.pkl')]
    cfg = run('test', 'seg.py', 'weights.pth', '--out', 'folder')
    assert all((m.output_dir, m.keep_results) == ('folder', True) for m in cfg.test_evaluator)
    assert "must be a .pkl or .pickle file for detections, got 'out.json'" in error(
        'test', 'det.py', 'weights.pth', '--out', 'out.json')
    assert "default_scope 'mmdet' or 'mmseg', got 'mmpose'" in error(
        'test', 'det.py', 'weights.pth', '--out', 'x', '--cfg-options', 'default_scope=mmpose')


def test_tta(run, error):
    cfg = run('test', 'det.py', 'weights.pth', '--tta')
    assert cfg.model.type == 'DetTTAModel' and cfg.model.module.type == 'MaskRCNN'
    first, last = cfg.test_dataloader.dataset.dataset.pipeline
    assert first.type == 'LoadImageFromFile' and last.type == 'TestTimeAug'
    assert [flip.prob for flip in last.transforms[0]] == [1.0, 0.0]
    cfg = run('test', 'seg_tta.py', 'weights.pth', '--tta')
    assert cfg.model.type == 'SegTTAModel' and cfg.model.module.type == 'EncoderDecoder'
    assert cfg.test_dataloader.dataset.pipeline == [dict(type='TestTimeAug')]
    assert '--tta needs tta_pipeline' in error('test', 'seg.py', 'weights.pth', '--tta')
    # A config of COCO asks for both metrics.
    both = ['--tta', '--cfg-options', "test_evaluator.metric=['bbox','segm']"]
    cfg = run('test', 'det.py', 'weights.pth', *both, 'model.roi_head.mask_head.a=1')
    assert cfg.test_evaluator.metric == ['bbox']
    assert 'the masks of MaskRCNN come with its boxes' in error(
        'test', 'det.py', 'weights.pth', *both)


@pytest.mark.parametrize('tool, least', [('train', 2), ('test', 3)])
def test_dist_scripts_pass_everything_on(folder, tool, least):
    script = TOOLS / f'dist_{tool}.sh'
    assert subprocess.run([script, 'one'], capture_output=True).returncode == 2
    fake = folder / 'python'
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$PYTHONPATH" "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    env = dict(PATH=f'{folder}{os.pathsep}{os.environ["PATH"]}', NNODES='2', NODE_RANK='1',
               MASTER_ADDR='10.0.0.1', PORT='12345')
    files = ['det.py', 'weights.pth'][:least - 1]
    done = subprocess.run([script, *files, '4', '--work-dir', 'a b'], env=env,
                          capture_output=True, text=True, check=True)
    path, *argv = done.stdout.splitlines()
    assert Path(path.split(':')[0]).resolve() == TOOLS.parent
    assert argv == [
        '-m', 'torch.distributed.run', '--nnodes=2', '--node_rank=1', '--master_addr=10.0.0.1',
        '--master_port=12345', '--nproc_per_node=4', str(TOOLS / f'{tool}.py'), *files,
        '--launcher', 'pytorch', '--work-dir', 'a b']


@pytest.mark.parametrize('tool, last', [
    ('train', ['det.py', '--work-dir', 'out', '--launcher', 'slurm', '--amp']),
    ('test', ['det.py', 'out', '--launcher', 'slurm', '--amp'])])
def test_slurm_scripts_pass_everything_on(folder, tool, last):
    script = TOOLS / f'slurm_{tool}.sh'
    assert subprocess.run([script, 'one'], capture_output=True).returncode == 2
    fake = folder / 'srun'
    fake.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    env = dict(PATH=f'{folder}{os.pathsep}{os.environ["PATH"]}', GPUS='16', SRUN_ARGS='-x a1 -t 9')
    done = subprocess.run([script, 'part', 'job', 'det.py', 'out', '--amp'], env=env,
                          capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        '--partition=part', '--job-name=job', '--gres=gpu:8', '--ntasks=16',
        '--ntasks-per-node=8', '--cpus-per-task=5', '--kill-on-bad-exit=1', '-x', 'a1', '-t', '9',
        'python', '-u', str(TOOLS / f'{tool}.py'), *last]


@pytest.mark.slow
def test_help_as_a_script():
    done = subprocess.run([sys.executable, TOOLS / 'train.py', '--help'], capture_output=True,
                          text=True, env=dict(os.environ, PYTHONPATH=str(TOOLS.parent)))
    assert done.returncode == 0 and '--auto-scale-lr' in done.stdout
