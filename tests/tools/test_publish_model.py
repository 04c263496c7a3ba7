"""A checkpoint that is ready to be published."""
import hashlib
import importlib.util
from pathlib import Path

import pytest
import torch
from mmengine.logging import HistoryBuffer

spec = importlib.util.spec_from_file_location(
    'publish_model', Path(__file__).parents[2] / 'tools/model_converters/publish_model.py')
publish_model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(publish_model)

STATE = dict(weight=torch.arange(3.0))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # A checkpoint as training writes it, with the logged history.
    torch.save(dict(meta=dict(cfg='data_root = "/home/me"', dataset_meta=dict(classes=('a', ))),
                    state_dict=STATE, optimizer=dict(state={}),
                    message_hub=dict(log_scalars=dict(loss=HistoryBuffer([1.0], [1])))), 'src.pth')
    return tmp_path


def test_weights_alone_under_the_name_of_their_hash(folder, capsys):
    publish_model.main(['src.pth', 'out/mine.pth'])
    path, = (folder / 'out').iterdir()
    assert capsys.readouterr().out.strip() == f'written to {path.relative_to(folder)}'
    assert path.name == f'mine-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth'
    written = torch.load(path, weights_only=True)
    assert set(written) == {'meta', 'state_dict'} and set(written['meta']) == {
        'cfg', 'dataset_meta'}
    assert torch.equal(written['state_dict']['weight'], STATE['weight'])


def test_the_config_can_stay_at_home(folder):
    path = publish_model.publish('src.pth', 'mine.pth', with_config=False)
    assert set(torch.load(path, weights_only=True)['meta']) == {'dataset_meta'}


@pytest.mark.parametrize('src, dst, message', [
    ('no.pth', 'mine.pth', "checkpoint 'no.pth' does not exist"),
    ('src.pth', 'mine', 'DST must end in .pth'),
    ('raw.pth', 'mine.pth', 'must be a file with a state_dict')])
def test_errors(folder, capsys, src, dst, message):
    torch.save(STATE, 'raw.pth')
    with pytest.raises(SystemExit):
        publish_model.main([src, dst])
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten(folder, capsys):
    publish_model.main(['src.pth', 'mine.pth'])
    with pytest.raises(SystemExit):
        publish_model.main(['src.pth', 'mine.pth'])
    assert '--force replaces it' in capsys.readouterr().err
    publish_model.main(['src.pth', 'mine.pth', '--force'])
    assert len(list(folder.glob('*mine*'))) == 1
