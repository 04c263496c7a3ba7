"""RandomStateHook: killed and resumed runs equal an uninterrupted one exactly."""
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import IterBasedTrainLoop
from toy_training import HOOK, Kill, make_fast, run

from kw_mm.engine.hooks.random_state import (
    RandomStateHook,
    get_random_state,
    set_random_state,
)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """No waiting, and no threads for tiny tensors."""
    make_fast(monkeypatch)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def kill_and_resume(work_dir, before_iter, *hooks, resumed_hooks=None, **kwargs):
    """Losses of a run killed before an iteration, and of its resumption."""
    killed = run(work_dir, *hooks, Kill(before_iter), **kwargs)
    assert max(killed) == before_iter - 1
    resumed_hooks = hooks if resumed_hooks is None else resumed_hooks
    return killed, run(work_dir, *resumed_hooks, resume=True, **kwargs)


def same(whole, *parts):
    return all(part[i] == whole[i] for part in parts for i in part)


@pytest.mark.parametrize('kwargs', [
    dict(), dict(validate=False), dict(save_best='score'),
    dict(workers=1, epochs=3, validate=False),
], ids=str)
def test_killed_in_mid_epoch(tmp_path, kwargs):
    whole = run(tmp_path / 'whole', HOOK, **kwargs)
    killed, resumed = kill_and_resume(tmp_path / 'parts', 10, HOOK, **kwargs)
    assert list(resumed)[0] == 8  # the end of the last complete epoch
    assert same(whole, killed, resumed)


@pytest.mark.parametrize('kwargs', [
    dict(sampler=InfiniteSampler), dict(sampler=DefaultSampler),
    dict(sampler=InfiniteSampler, save_best='score'),
    # Slow because torch waits for abandoned workers.
    pytest.param(dict(sampler=InfiniteSampler, workers=1, validate=False),
                 marks=pytest.mark.slow),
], ids=str)
def test_iteration_based_loop(tmp_path, kwargs):
    whole = run(tmp_path / 'whole', HOOK, by_epoch=False, **kwargs)
    killed, resumed = kill_and_resume(tmp_path / 'parts', 12, HOOK, by_epoch=False, **kwargs)
    assert list(resumed)[0] in (10, 12)  # the last checkpoint: 10, or the best
    assert same(whole, killed, resumed)


# The maintained fork's loop asks the iterator to skip, and no run could be resumed.
@pytest.mark.parametrize('skips', [True, False])
def test_the_loop_of_the_fork(monkeypatch, skips):
    put_back = []
    hook = RandomStateHook()
    hook._paused = ['states']
    monkeypatch.setattr(hook, '_put_back', lambda: put_back.append(len(put_back)))
    loop = object.__new__(IterBasedTrainLoop)
    loop._iter, loop.fast_forward_on_resume = 3, not skips
    loop.dataloader_iterator = iter(range(5))
    hook.before_train_epoch(SimpleNamespace(train_loop=loop))
    if skips:
        loop.dataloader_iterator.skip_iter(3)
        assert not put_back
    assert next(loop.dataloader_iterator) == (3 if skips else 0)
    next(loop.dataloader_iterator)
    assert put_back == [0]


@pytest.mark.parametrize('by_epoch', [True, False])
def test_control_without_the_hook(tmp_path, by_epoch):
    whole = run(tmp_path / 'whole', by_epoch=by_epoch)
    killed, resumed = kill_and_resume(tmp_path / 'parts', 10, by_epoch=by_epoch)
    assert same(whole, killed) and not same(whole, resumed)


def test_training_does_not_depend_on_validation(tmp_path):
    whole = run(tmp_path / 'with', HOOK)
    assert run(tmp_path / 'without', HOOK, validate=False) == whole
    assert run(tmp_path / 'with_unhooked') != run(tmp_path / 'without_unhooked', validate=False)


# mmengine builds the data loader with a new seed before it reads the checkpoint's.
def test_seed_that_mmengine_drew(tmp_path):
    np.random.seed(1)
    whole = run(tmp_path / 'whole', HOOK, seed=None)
    np.random.seed(1)
    killed = run(tmp_path / 'parts', HOOK, Kill(10), seed=None)
    np.random.seed(2)
    resumed = run(tmp_path / 'parts', HOOK, seed=None, resume=True)
    assert same(whole, killed, resumed)


def test_load_from_takes_nothing_over(tmp_path):
    run(tmp_path / 'old', HOOK, epochs=1)
    load_from = str(tmp_path / 'old' / 'epoch_1.pth')
    assert run(tmp_path / 'a', HOOK, load_from=load_from) == run(
        tmp_path / 'b', load_from=load_from, validate=False)


def test_checkpoint_without_states(tmp_path):
    kill_and_resume(tmp_path, 10, resumed_hooks=[HOOK])
    assert 'it has none: the run goes on' in logs(tmp_path)


def test_another_number_of_processes(tmp_path):
    run(tmp_path, HOOK, Kill(10))
    path = tmp_path / 'epoch_2.pth'
    checkpoint = torch.load(path)
    checkpoint['random_states']['processes'] *= 2
    torch.save(checkpoint, path)
    assert list(run(tmp_path, HOOK, resume=True)) == list(range(8, 16))
    assert 'it has those of 2 processes, this run 1' in logs(tmp_path)


def logs(work_dir):
    return ''.join(path.read_text() for path in work_dir.rglob('*.log'))


def test_states_are_plain_values(tmp_path):
    np.random.randn()
    random.gauss(0, 1)
    torch.save(get_random_state(), tmp_path / 'state.pth')

    def draw():
        return (random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(),
                torch.rand(()).item())

    first = draw()
    assert draw() != first
    set_random_state(torch.load(tmp_path / 'state.pth', weights_only=True))
    assert draw() == first
