"""A short campaign of kills, and a campaign that finds faults of mmengine's own writing."""
import mmengine.runner.runner
import pytest
import torch
from mmengine.hooks import CheckpointHook, checkpoint_hook
from mmengine.runner import Runner
from mmengine.runner import checkpoint as mmengine_checkpoint
from toy_training import HOOK, make_fast, run

from kw_mm.engine.killing import differences, run_campaign

KWARGS = [dict(save_best='score', keep=1), dict(by_epoch=False, keep=2)]


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    make_fast(monkeypatch)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.parametrize('kwargs', KWARGS, ids=['epochs', 'iterations'])
def test_killed_runs_end_as_if_they_had_not_been(tmp_path, kwargs):
    said = []
    outcome = run_campaign(lambda work_dir: run(work_dir, HOOK, resume=True, **kwargs),
                           str(tmp_path / 'runs'), kills=12, report=said.append)
    assert outcome.is_clean, said
    assert outcome.kills == 12 and outcome.random and outcome.writing and outcome.survivors
    # Runs without differences are removed, except the undisturbed one.
    assert [path.name for path in (tmp_path / 'runs').iterdir() if path.is_dir()] == ['whole']


def as_mmengine_does(work_dir):
    """A run without our patches, in a child process, so that they stay here."""
    plain = mmengine_checkpoint.save_checkpoint.__wrapped__
    mmengine_checkpoint.save_checkpoint = mmengine.runner.runner.save_checkpoint = plain
    del checkpoint_hook.open
    for owner, name in ((CheckpointHook, '_save_checkpoint_with_step'),
                        (Runner, 'load_or_resume')):
        method = getattr(owner, name)
        while hasattr(method, '__wrapped__'):
            method = method.__wrapped__
        setattr(owner, name, method)
    run(work_dir, HOOK, resume=True, keep=1)


@pytest.mark.slow
def test_a_campaign_finds_what_mmengine_loses(tmp_path):
    said = []
    outcome = run_campaign(as_mmengine_does, str(tmp_path / 'runs'), kills=12, report=said.append)
    assert outcome.refused and not outcome.is_clean
    assert any('REFUSED' in line for line in said)
    # With its log kept.
    assert all((tmp_path / 'runs' / f'{path.rpartition("/")[2]}.log').exists()
               for path in outcome.refused)


def test_other_random_numbers_are_found(tmp_path):
    def train(work_dir):
        run(work_dir, HOOK, resume=True, seed=len(list(tmp_path.glob('runs/*.log'))))

    outcome = run_campaign(train, str(tmp_path / 'runs'), kills=2, report=lambda line: None)
    assert outcome.different and not outcome.is_clean


def test_a_run_that_fails_when_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match='the run that was left alone failed; see .*whole.log'):
        run_campaign(lambda work_dir: 1 / 0, str(tmp_path / 'runs'), kills=1)
    assert 'ZeroDivisionError' in (tmp_path / 'runs' / 'whole.log').read_text()


def test_differences():
    first = dict(state_dict=dict(a=torch.tensor([0., float('nan')]), b=torch.ones(2)), meta=1,
                 optimizer=dict(state=[dict(step=1)], gone=0))
    second = dict(state_dict=dict(a=first['state_dict']['a'].clone(), b=torch.ones(2).double()),
                  meta=2, optimizer=dict(state=[dict(step=2)], new=0))
    assert differences(first, first) == []
    assert differences(first, second) == ['state_dict.b', 'optimizer.state.0.step',
                                          'optimizer.gone', 'optimizer.new']
    second['state_dict']['a'][0] = -0.
    assert 'state_dict.a' in differences(first, second)
