"""Checkpoints under ``weights_only``, distributed runs on CPUs, bfloat16 in mmcv."""
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import run_ranks
from mmcv.ops import nms, roi_align
from mmcv.ops.roi_align import RoIAlignFunction
from mmengine.config import Config
from mmengine.config.utils import _get_package_and_cfg_path
from mmengine.dist import all_gather_object
from mmengine.dist import utils as dist_utils
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner, checkpoint
from mmengine.utils.dl_utils import load_url
from torch import nn
from torch.torch_version import TorchVersion
from toy_training import make_fast

import kw_mm  # noqa: F401  (applies the patches)
from kw_mm import compat, unpickling
from kw_mm.checkpoint import check_checkpoint

ROOT = Path(__file__).parents[1]

# Since then torch.load builds only tensors and containers.
needs_allow_list = pytest.mark.skipif(torch.__version__ < (2, 6), reason='no allow list')


def python(code, *args):
    """Runs code in a fresh process."""
    return subprocess.run(
        [sys.executable, '-c', code, *map(str, args)], capture_output=True, text=True,
        env=dict(os.environ, PYTHONPATH=str(ROOT)))


class Getattr:
    """Pickled as the call ``getattr(obj, name)``."""

    def __init__(self, obj, name):
        self.call = getattr, (obj, name)

    def __reduce__(self):
        return self.call


class Exploit:
    """Reaches ``eval`` through getattr, and calls it through a function torch always allows."""

    def __init__(self, code):
        builtins = Getattr(getattr, '__self__')
        self.call = torch._tensor._rebuild_from_type_v2, (
            Getattr(builtins, 'eval'), torch.Tensor, (code,), None)

    def __reduce__(self):
        return self.call


@needs_allow_list
def test_malicious_checkpoint_runs_no_code(tmp_path):
    path, marker = tmp_path / 'evil.pth', tmp_path / 'executed'
    torch.save(dict(state_dict=Exploit(f'open({str(marker)!r}, "w").close()')), path)

    with pytest.raises(ValueError, match="must not ask for getattr.*'__self__'"):
        torch.load(path, weights_only=True)
    with pytest.raises(ValueError, match='evil.pth.* is refused'):
        check_checkpoint(str(path))
    assert not marker.exists()

    # The attack works if getattr itself is allowed, as torch's error message suggests.
    advised = python('import sys, torch; torch.serialization.add_safe_globals([getattr]); '
                     'torch.load(sys.argv[1], weights_only=True)', path)
    assert marker.exists(), advised.stderr


@needs_allow_list
@pytest.mark.parametrize('obj, name', [
    (HistoryBuffer, '__init__'), (HistoryBuffer, '__subclasses__'), (HistoryBuffer, '__globals__'),
    (HistoryBuffer.mean, '__globals__'), (np.ndarray, 'tofile'), (getattr, '__self__')])
def test_getattr_of_anything_else_is_refused(tmp_path, obj, name):
    torch.save(Getattr(obj, name), tmp_path / 'file.pth')
    with pytest.raises(Exception, match='must not ask|Unsupported global'):
        torch.load(tmp_path / 'file.pth', weights_only=True)


class Call:
    """A plain call of ``eval``, which no list allows."""

    def __init__(self, code):
        self.code = code

    def __reduce__(self):
        return eval, (self.code,)


def fork_loader(file, map_location=None, weights_only=None):
    """What onedl-mmengine 0.10.12 loads checkpoints with."""
    if unpickling.IS_NEEDED:
        return torch.load(file, map_location=map_location)
    try:
        with torch.serialization.safe_globals([getattr, HistoryBuffer]):
            return torch.load(file, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        return torch.load(file, map_location=map_location, weights_only=False)


@pytest.fixture
def unpatched(monkeypatch):
    """mmengine's loaders as they come, and after the test as they were."""
    monkeypatch.setattr(checkpoint, 'torch', torch)
    monkeypatch.setattr(checkpoint, 'load_url', load_url)


# That of the fork tried again with weights_only=False, and URLs are loaded so on every torch: both
# ran a file's code. On torch below 2.6 so did plain files.
@pytest.mark.parametrize('old', [False, True], ids=['', 'before 2.6'])
@pytest.mark.parametrize('way', ['file', 'fork', 'url', 'cached url'])
def test_mmengine_s_loaders_run_no_code(tmp_path, monkeypatch, unpatched, way, old):
    path, marker = tmp_path / 'evil.pth', tmp_path / 'executed'
    torch.save(dict(state_dict=Call(f'open({str(marker)!r}, "w").close()')), path)
    name = str(path)
    if way == 'fork':
        monkeypatch.setattr(checkpoint, '_safe_torch_load', fork_loader, raising=False)
        monkeypatch.setitem(
            checkpoint.CheckpointLoader._schemes, '', lambda filename, map_location:
            checkpoint._safe_torch_load(filename, map_location=map_location))
    elif 'url' in way:
        monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
        name = path.as_uri().replace('file:', 'http:')
        monkeypatch.setattr(torch.hub, 'download_url_to_file',
                            lambda url, file, *args, **kwargs: shutil.copy(path, file))
        if way == 'cached url':
            (tmp_path / 'checkpoints').mkdir()
            shutil.copy(path, tmp_path / 'checkpoints' / 'evil.pth')
    # Plain files are safe by themselves on the torch at hand, if it is none of old.
    if way != 'file' or unpickling.IS_NEEDED:
        checkpoint._load_checkpoint(name, 'cpu')
        assert marker.exists()
        marker.unlink()

    monkeypatch.setattr(unpickling, 'IS_NEEDED', old or unpickling.IS_NEEDED)
    compat.keep_mmengine_from_unsafe_loading()
    with pytest.raises(pickle.UnpicklingError, match=r'GLOBAL (builtins\.)?eval'):
        checkpoint._load_checkpoint(name, 'cpu')
    assert not marker.exists()
    torch.save(dict(a=torch.ones(2)), path)
    shutil.copy(path, tmp_path / 'good.pth')
    # Under another name, for files of URLs are kept.
    loaded = checkpoint._load_checkpoint(name.replace('evil', 'good'), 'cpu')
    assert loaded['a'].tolist() == [1, 1]


def test_who_asks_for_it_loads_what_is_trusted(tmp_path, monkeypatch, unpatched):
    monkeypatch.setattr(checkpoint, '_safe_torch_load', fork_loader, raising=False)
    compat.keep_mmengine_from_unsafe_loading()
    torch.save(dict(a=Path('b')), tmp_path / 'trusted.pth')
    loaded = checkpoint._safe_torch_load(tmp_path / 'trusted.pth', weights_only=False)
    assert loaded == dict(a=Path('b'))
    # Of torch there is all else, and elsewhere it is as ever.
    assert checkpoint.torch.nn is nn and torch.load is not checkpoint.torch.load


class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def forward(self, inputs, data_samples=None, mode='loss'):
        return dict(loss=self.layer(torch.stack(inputs)).square().mean())


def train(work_dir, monkeypatch, **kwargs):
    monkeypatch.setattr(Runner, '_log_env', lambda *args: None)  # saves a second for other programs
    data = [dict(inputs=torch.rand(2)) for _ in range(4)]
    runner = Runner(
        dict(type=Net), str(work_dir),
        train_dataloader=dict(dataset=data, batch_size=2, sampler=dict(type='DefaultSampler')),
        train_cfg=dict(by_epoch=True, max_epochs=1), param_scheduler=dict(type='LinearLR', end=4),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1)),
        experiment_name=str(work_dir).replace('/', '_'), **kwargs)
    runner.message_hub.update_info('best_score', np.float32(0.5))  # as mmseg's metrics do
    runner.train()
    return runner


def plain(value):
    """A checkpoint as values that can be compared with ==."""
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    if isinstance(value, HistoryBuffer):
        return plain(value.data), plain(value.max_length), sorted(value._statistics_methods)
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


@needs_allow_list
def test_checkpoint_of_mmengine_loads_whole(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch, custom_hooks=[dict(type='EMAHook')])
    path = tmp_path / 'epoch_1.pth'
    safe, full = (torch.load(path, weights_only=only) for only in (True, False))
    assert plain(safe) == plain(full)
    assert safe['message_hub']['log_scalars']['train/loss'].mean() > 0
    assert type(safe['message_hub']['runtime_info']['best_score']) is np.float32
    check_checkpoint(str(path), resume=True)
    # Without the allow list it fails.
    unaided = python('import sys, torch, mmengine; torch.load(sys.argv[1])', path)
    assert 'Unsupported global' in unaided.stderr


@needs_allow_list
@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
@pytest.mark.parametrize('dtype', ['?', 'i1', 'u2', 'i4', 'i8', 'f2', 'f4', 'f8'])
def test_arrays_of_numpy_1_and_2(tmp_path, module, dtype):
    array = np.arange(3).astype(dtype)
    path = tmp_path / 'file.pth'
    # The old format, whose pickle is not in an archive.
    torch.save([array, array[1]], path, _use_new_zipfile_serialization=False)
    written = np.zeros(1).__reduce__()[0].__module__
    path.write_bytes(path.read_bytes().replace(written.encode(), module.encode()))
    first, second = torch.load(path, weights_only=True)
    assert first.dtype == second.dtype == array.dtype
    assert first.tolist() == array.tolist() and second == array[1]


def test_apply_again_changes_nothing():
    patched = dist_utils._init_dist_pytorch
    compat.apply()
    assert dist_utils._init_dist_pytorch is patched


def test_launcher_leaves_accelerators_to_mmengine(monkeypatch):
    calls = []
    monkeypatch.setattr(compat, 'has_accelerator', lambda: True)
    monkeypatch.setattr(dist_utils, '_init_dist_pytorch',
                        lambda *args, **kwargs: calls.append((args, kwargs)))
    compat.patch_pytorch_launcher()
    dist_utils.init_dist('pytorch', timeout=60)
    assert len(calls) == 1 and calls[0][0] == ('nccl',)


def test_launcher_without_the_function_it_patches(monkeypatch):
    monkeypatch.delattr(dist_utils, '_init_dist_pytorch')
    compat.patch_pytorch_launcher()
    assert not hasattr(dist_utils, '_init_dist_pytorch')


@pytest.fixture
def cpu(monkeypatch):
    monkeypatch.setattr(compat, 'has_accelerator', lambda: False)


def prepared(**cfg):
    cfg = Config(dict(dict(launcher='pytorch'), **cfg))
    compat.prepare_cpu_ddp_(cfg)
    return cfg


def test_wrapper_config(cpu):
    expected = dict(type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False)
    assert prepared().model_wrapper_cfg == dict(expected, find_unused_parameters=False)
    cfg = prepared(find_unused_parameters=True)
    assert cfg.model_wrapper_cfg == dict(expected, find_unused_parameters=True)


def test_own_wrapper_config_is_kept(cpu):
    own = dict(find_unused_parameters=True, broadcast_buffers=True)
    assert prepared(model_wrapper_cfg=own).model_wrapper_cfg == dict(own, device_ids=None)
    own = dict(type='MMFullyShardedDataParallel')
    assert prepared(model_wrapper_cfg=own).model_wrapper_cfg == own


def test_synchronised_batch_norms_are_reverted(cpu):
    cfg = prepared(sync_bn='torch', model=dict(
        backbone=dict(norm_cfg=dict(type='SyncBN', requires_grad=True)),
        heads=[dict(norm_cfg=dict(type='GN')), dict(norm_cfg=dict(type='MMSyncBN'))]))
    assert cfg.model.backbone.norm_cfg == dict(type='BN', requires_grad=True)
    assert [head.norm_cfg.type for head in cfg.model.heads] == ['GN', 'BN']
    assert cfg.sync_bn is None


@pytest.mark.parametrize('launcher, accelerator', [('none', False), ('pytorch', True)])
def test_config_is_left_alone_elsewhere(monkeypatch, launcher, accelerator):
    monkeypatch.setattr(compat, 'has_accelerator', lambda: accelerator)
    cfg = dict(launcher=launcher, model=dict(norm_cfg=dict(type='SyncBN')))
    assert prepared(**cfg).to_dict() == cfg


@pytest.mark.parametrize('version, accelerator, fused', [
    ('2.1.2', False, False), ('2.1.2', True, True), ('2.4.0', False, True),
    ('2.13.0', False, True)])
def test_fused_optimizers_where_torch_has_none_for_cpus(monkeypatch, version, accelerator, fused):
    # The segmentation demo did not start on torch 2.1.
    monkeypatch.setattr(torch, '__version__', TorchVersion(version))
    monkeypatch.setattr(compat, 'has_accelerator', lambda: accelerator)
    for given in (dict(type='AdamW', fused=True), dict(type='SGD')):
        cfg = Config(dict(optim_wrapper=dict(optimizer=given)))
        compat.prepare_cpu_optimizer_(cfg)
        assert cfg.optim_wrapper.optimizer == (dict(given, fused=fused) if 'fused' in given
                                               else given)
    compat.prepare_cpu_optimizer_(Config())


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return dict(inputs=torch.ones(2) * index)


class NoisyNet(Net):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(1, 1)

    def forward(self, inputs, data_samples=None, mode='loss'):
        x = torch.stack(inputs)
        return dict(loss=self.layer(x + torch.rand(x.shape)).square().mean())


def train_and_resume(work_dir):
    """In each of two processes."""
    # Importing must not make a process group.
    assert not torch.distributed.is_initialized()
    DATASETS.register_module(module=Numbers)
    MODELS.register_module(module=NoisyNet)
    cfg = Config(dict(
        launcher='pytorch', env_cfg=dict(dist_cfg=dict(backend='nccl')), work_dir=str(work_dir),
        model=dict(type='NoisyNet'), find_unused_parameters=True,
        train_dataloader=dict(dataset=dict(type='Numbers'), batch_size=1,
                              sampler=dict(type='DefaultSampler')),
        train_cfg=dict(by_epoch=True, max_epochs=2), default_scope='mmengine',
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        randomness=dict(seed=0, diff_rank_seed=True), custom_hooks=[dict(type='RandomStateHook')]))
    compat.prepare_cpu_ddp_(cfg)

    def train(**kwargs):
        runner = Runner.from_cfg(Config(dict(cfg.to_dict(), **kwargs)))
        model = runner.train()
        assert torch.distributed.get_backend() == 'gloo'
        return all_gather_object((model.module.layer.weight.tolist(), torch.rand(()).item()))

    whole = train(experiment_name='whole')
    assert whole[0][0] == whole[1][0] and whole[0][1] != whole[1][1]
    resumed = train(experiment_name='resumed', resume=True, load_from=f'{work_dir}/epoch_1.pth')
    # The weights follow from the noise of both processes, so that both states were resumed.
    assert resumed == whole, (resumed, whole)
    # gloo's threads end with the group; at exit they would abort.
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(compat.has_accelerator(), reason='for machines without accelerator')
@pytest.mark.skipif(sys.platform == 'win32', reason='processes cannot be forked')
def test_two_processes_train_and_resume_on_cpus(tmp_path, monkeypatch):
    make_fast(monkeypatch)
    run_ranks(train_and_resume, tmp_path / 'work', num=2, log=tmp_path / 'output.txt')


def test_mmcv_operators_take_bfloat16():
    # mmcv has no kernels for it: "expected scalar type Float but found BFloat16".
    torch.manual_seed(0)
    features = torch.randn(1, 4, 16, 16, dtype=torch.bfloat16, requires_grad=True)
    rois = torch.tensor([[0, 1, 1, 9, 9], [0, 3, 2, 12, 14]], dtype=torch.bfloat16)
    out = roi_align(features, rois, (4, 4), 1.0, 2)
    exact = features.detach().float().requires_grad_()
    expected = roi_align(exact, rois.float(), (4, 4), 1.0, 2)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16())
    out.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(features.grad, exact.grad.bfloat16())
    assert expected.dtype == exact.grad.dtype == torch.float32

    boxes = torch.tensor([[0, 0, 8, 8], [0, 0, 8, 7], [20, 20, 30, 30]], dtype=torch.bfloat16)
    dets, kept = nms(boxes, torch.tensor([0.5, 0.75, 0.25], dtype=torch.bfloat16), 0.5)
    assert kept.tolist() == [1, 2]
    assert dets.dtype == torch.bfloat16
    before = RoIAlignFunction.forward
    compat.let_mmcv_ops_take_bfloat16()
    assert RoIAlignFunction.forward is before


def test_bases_of_the_forks_mmsegmentation(monkeypatch):
    # "mmsegmentation is not installed": the fork's package has another name, and so every config of
    # a segmentor failed there.
    monkeypatch.setitem(compat.MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    monkeypatch.setattr(compat, 'installed_version', {'mmsegmentation': '1.2.2'}.get)
    compat.let_configs_inherit_the_forks()
    assert _get_package_and_cfg_path('mmseg::fcn/fcn_r50.py')[0] == 'mmsegmentation'
    monkeypatch.setattr(compat, 'installed_version', {'onedl-mmsegmentation': '1.4.2'}.get)
    compat.let_configs_inherit_the_forks()
    assert _get_package_and_cfg_path('mmseg::fcn/fcn_r50.py') == ('mmseg', 'fcn/fcn_r50.py')
