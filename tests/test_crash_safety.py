"""The files that mmengine writes in training, and resuming from them, in real runs."""
import errno
import os

import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import FileClient, LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner, save_checkpoint
from mmengine.runner import checkpoint as mmengine_checkpoint
from toy_training import HOOK, Kill, make_fast, run

from kw_mm import crash_safety
from kw_mm.crash_safety import choose_checkpoint_
from kw_mm.files import NotWrittenError, replacing


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    make_fast(monkeypatch)


@pytest.fixture
def said(monkeypatch):
    """The log lines about the choice."""
    lines = []
    monkeypatch.setattr(crash_safety, 'print_log', lambda text, *args: lines.append(text))
    return lines


def checkpoints(folder):
    """The files of a folder, except configs, whose names contain the time."""
    return sorted(path.name for path in folder.iterdir()
                  if path.is_file() and path.suffix != '.py')


def test_apply_again_changes_nothing():
    before = (Runner.load_or_resume, CheckpointHook.before_train, save_checkpoint)
    crash_safety.apply()
    assert before == (Runner.load_or_resume, CheckpointHook.before_train,
                      mmengine_checkpoint.save_checkpoint)


@pytest.mark.parametrize('kwargs, kept', [
    (dict(), ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth', 'epoch_4.pth']),
    (dict(keep=2), ['epoch_3.pth', 'epoch_4.pth']),
    (dict(keep=1, save_best='score'), ['best_score_epoch_4.pth', 'epoch_4.pth']),
    (dict(by_epoch=False, keep=1), ['iter_16.pth'])], ids=str)
def test_what_is_there_in_the_end_is_as_ever(tmp_path, kwargs, kept):
    run(tmp_path, **kwargs)
    assert checkpoints(tmp_path) == [*kept, 'last_checkpoint']
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / kept[-1])


class DiskFull:
    """After a number of files, nothing can be written."""

    def __init__(self, monkeypatch, name):
        self.name = name
        self.sync = os.fsync
        self.path = None
        monkeypatch.setattr('kw_mm.files._open_unfinished', self.opened)
        monkeypatch.setattr('kw_mm.files.os.fsync', self.synced)

    def opened(self, target):
        self.path = target.name
        unfinished = target.with_name(f'.{target.name}.0.unfinished')
        return open(unfinished, 'xb'), unfinished  # noqa: SIM115

    def synced(self, descriptor):
        if self.path == self.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.sync(descriptor)


@pytest.mark.parametrize('full, kwargs, left', [
    ('epoch_2.pth', dict(keep=1), ['epoch_1.pth', 'last_checkpoint']),
    ('best_score_epoch_2.pth', dict(keep=2, save_best='score'), [
        'best_score_epoch_1.pth', 'epoch_1.pth', 'epoch_2.pth', 'last_checkpoint']),
    ('iter_10.pth', dict(by_epoch=False, keep=1), ['iter_5.pth', 'last_checkpoint'])])
def test_nothing_is_deleted_for_what_does_not_fit(tmp_path, monkeypatch, full, kwargs, left):
    whole = run(tmp_path / 'whole', HOOK, **kwargs)
    with monkeypatch.context() as patch:
        DiskFull(patch, full)
        with pytest.raises(NotWrittenError, match=f"{full}' cannot be written: No space left"):
            run(tmp_path / 'run', HOOK, **kwargs)
    assert checkpoints(tmp_path / 'run') == left
    # With room again it continues and removes leftovers.
    resumed = run(tmp_path / 'run', HOOK, resume=True, **kwargs)
    assert resumed and all(loss == whole[at] for at, loss in resumed.items())
    assert checkpoints(tmp_path / 'run') == checkpoints(tmp_path / 'whole')


def test_an_old_checkpoint_that_was_to_go_goes_with_the_next_run(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(crash_safety._RemovesLater, 'remove_now', lambda self: None)
        run(tmp_path, HOOK, Kill(13), keep=2)
    run(tmp_path / 'other', HOOK, Kill(2), keep=2)
    assert checkpoints(tmp_path)[:3] == ['epoch_1.pth', 'epoch_2.pth', 'epoch_3.pth']
    run(tmp_path, HOOK, Kill(13), keep=2, resume=True)
    assert checkpoints(tmp_path)[:2] == ['epoch_2.pth', 'epoch_3.pth']


def test_a_checkpoint_that_takes_its_own_name_again_stays(tmp_path):
    # Happens with the best of an epoch that is validated twice.
    backend = crash_safety._RemovesLater(LocalBackend())
    for name in 'ab':
        (tmp_path / name).write_text('old')
        backend.remove(str(tmp_path / name))
    assert backend.isfile(str(tmp_path / 'b'))
    with replacing(tmp_path / 'b') as stream:
        stream.write(b'new')
    backend.remove_now()
    assert checkpoints(tmp_path) == ['b'] and (tmp_path / 'b').read_text() == 'new'


def test_a_torn_checkpoint_is_passed(tmp_path, said):
    whole = run(tmp_path / 'whole', HOOK)
    run(tmp_path / 'run', HOOK, Kill(13))
    torn = tmp_path / 'run' / 'epoch_3.pth'
    torn.write_bytes(torn.read_bytes()[:-100])
    resumed = run(tmp_path / 'run', HOOK, resume=True)
    assert list(resumed) == list(range(8, 16))
    assert all(loss == whole[at] for at, loss in resumed.items())
    assert said == [f"Resuming from {tmp_path / 'run' / 'epoch_2.pth'}, the newest whole "
                    f"checkpoint; checkpoint {str(torn)!r} is cut off: its writing was "
                    'interrupted, or it was not copied to the end']


def test_checkpoints_in_another_folder(tmp_path, said):
    folder = tmp_path / 'big' / 'run'
    checkpoint = dict(out_dir=str(tmp_path / 'big'), filename_tmpl='net-{}.pth')
    run(tmp_path / 'run', HOOK, Kill(9), checkpoint=checkpoint)
    assert checkpoints(folder) == ['net-1.pth', 'net-2.pth']
    (tmp_path / 'run' / 'last_checkpoint').write_text('')
    resumed = run(tmp_path / 'run', HOOK, resume=True, checkpoint=checkpoint)
    assert list(resumed)[0] == 8
    assert 'net-2.pth, the newest whole checkpoint; last_checkpoint is empty' in said[0]


def test_nothing_to_resume_from_is_said(tmp_path, said):
    assert list(run(tmp_path, HOOK, Kill(2), resume=True)) == [0, 1]
    assert said == [f'Nothing to resume from in {tmp_path}: training starts from the beginning']


class OnRank:
    """A runner in one of several processes."""

    hooks = ()
    _resume, _load_from = True, None

    def __init__(self, work_dir):
        self.work_dir = str(work_dir)


def test_all_processes_go_on_from_the_same_file(tmp_path, said, monkeypatch):
    # The second process sees another folder content, which can happen on a network disk.
    for name in ('first', 'second'):
        run(tmp_path / name, Kill(9))
    (tmp_path / 'second' / 'epoch_2.pth').unlink()
    sent = []
    monkeypatch.setattr(crash_safety, 'broadcast_object_list', lambda data: sent.extend(data))
    first, second = OnRank(tmp_path / 'first'), OnRank(tmp_path / 'second')
    assert choose_checkpoint_(first)

    def receive(data):
        data[:] = sent

    monkeypatch.setattr(crash_safety, 'get_rank', lambda: 1)
    monkeypatch.setattr(crash_safety, 'broadcast_object_list', receive)
    assert choose_checkpoint_(second)
    assert first._load_from == second._load_from == str(tmp_path / 'first' / 'epoch_2.pth')
    # An error in the first process is raised in all.
    sent[:] = ['nothing can be resumed from']
    with pytest.raises(ValueError, match='nothing can be resumed from'):
        choose_checkpoint_(OnRank(tmp_path / 'second'))


class Elsewhere(LocalBackend):
    """Stores files in a dict."""

    stored = {}

    def put(self, obj, filepath):
        self.stored[str(filepath)] = obj


def test_other_places_than_disks_are_left_to_mmengine():
    FileClient.register_backend('elsewhere', Elsewhere, prefixes='elsewhere', force=True)
    register_backend('elsewhere', Elsewhere, prefixes='elsewhere', force=True)
    save_checkpoint(dict(w=torch.zeros(1)), 'elsewhere://a.pth')
    assert list(Elsewhere.stored) == ['elsewhere://a.pth']
    with pytest.raises(ValueError, match='cannot be set at the same time'):
        save_checkpoint({}, 'a.pth', file_client_args=dict(backend='disk'),
                        backend_args=dict(backend='local'))


@pytest.mark.parametrize('kwargs', [dict(), dict(file_client_args=dict(backend='disk')),
                                    dict(backend_args=dict(backend='local'))])
def test_on_a_disk_no_half_checkpoint_is_seen(tmp_path, monkeypatch, kwargs):
    path = tmp_path / 'new' / 'a.pth'

    def looking(checkpoint, stream):
        assert not path.exists()
        stream.write(b'all')
        assert not path.exists()

    monkeypatch.setattr(torch, 'save', looking)
    save_checkpoint({}, str(path), **kwargs)
    assert path.read_bytes() == b'all' and checkpoints(path.parent) == ['a.pth']


def test_configs_are_dumped_whole(tmp_path, monkeypatch):
    cfg = Config(dict(a=1))
    cfg.dump(tmp_path / 'a.py')
    assert Config.fromfile(tmp_path / 'a.py').a == 1
    assert cfg.dump() == cfg.pretty_text
    cfg.dump(str(tmp_path / 'a.json'))
    assert Config.fromfile(tmp_path / 'a.json').a == 1
    DiskFull(monkeypatch, 'a.py')
    with pytest.raises(NotWrittenError, match='No space left'):
        Config(dict(b=2)).dump(tmp_path / 'a.py')
    assert Config.fromfile(tmp_path / 'a.py').a == 1
