"""Reading checkpoint files runs no code, and writing leaves no incomplete file."""
import argparse
import os
import pickle
import stat

import pytest
import torch

from kw_mm.checkpoint import check_destination, read_checkpoint, write_checkpoint

WEIGHTS = dict(model=dict(w=torch.arange(3.)))
OPTIONS = argparse.Namespace(lr=0.1, model='kw', nested=argparse.Namespace(a=[1]))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize('legacy', [False, True])
def test_options_are_read_where_they_are_allowed(legacy):
    torch.save(dict(WEIGHTS, args=OPTIONS), 'a.pth', _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint('a.pth', allowed=[argparse.Namespace])
    assert torch.equal(read['model']['w'], WEIGHTS['model']['w']) and read['args'] == OPTIONS
    # Allowed for that one file, not from then on.
    with pytest.raises(ValueError, match="'a.pth' holds argparse.Namespace, which torch.load re"):
        read_checkpoint('a.pth')


class Crafted:
    """Pickles as a call that would create a file."""

    def __reduce__(self):
        return os.system, ('touch ran',)


class CraftedNamespace:
    """Pickles as a call of Namespace with positional arguments, and a state that is code."""

    def __reduce__(self):
        return argparse.Namespace, ('touch ran',), Crafted()


@pytest.mark.parametrize('crafted', [Crafted(), CraftedNamespace(),
                                     argparse.Namespace(a=Crafted())],
                         ids=['object', 'namespace', 'inside a namespace'])
def test_code_is_refused(folder, crafted):
    torch.save(dict(WEIGHTS, args=crafted), 'a.pth')
    with pytest.raises(ValueError, match="'a.pth' (holds|is refused|is cut off)"):
        read_checkpoint('a.pth', allowed=[argparse.Namespace])
    assert [file.name for file in folder.iterdir()] == ['a.pth']


def test_a_namespace_is_but_attributes():
    # Unpickling creates one without arguments, then sets its attributes.
    assert '__setstate__' not in vars(argparse.Namespace)
    assert argparse.Namespace.__new__ is object.__new__
    assert '__setattr__' not in vars(argparse.Namespace)


@pytest.mark.parametrize('name, content, message', [
    ('a.txt', b'text', "'a.txt' is cut off or no checkpoint"),
    ('a.pth', b'PK\x03\x04 and no more', "'a.pth' is cut off: its writing was interrupted"),
    ('a.pth', b'', "'a.pth' is cut off or no checkpoint"),
    ('a.pkl', pickle.dumps([1], protocol=2), "'a.pkl' is cut off or no checkpoint")],
    ids=['text', 'cut', 'empty', 'pickle'])
def test_files_that_are_none(folder, name, content, message):
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_checkpoint(name)


def test_lists_and_missing_files():
    torch.save([1], 'a.pth')
    with pytest.raises(ValueError, match="'a.pth' must hold a dict, got list"):
        read_checkpoint('a.pth')
    with pytest.raises(FileNotFoundError, match="'no.pth' does not exist"):
        read_checkpoint('no.pth')


def test_what_is_written_is_read_again(folder):
    write_checkpoint(WEIGHTS, 'new/deep/a.pth')
    assert torch.equal(read_checkpoint('new/deep/a.pth')['model']['w'], WEIGHTS['model']['w'])
    assert [file.name for file in (folder / 'new' / 'deep').iterdir()] == ['a.pth']
    # Others can read it like any new file.
    (folder / 'plain').touch()
    assert stat.S_IMODE(os.stat('new/deep/a.pth').st_mode) == stat.S_IMODE(os.stat('plain').st_mode)


def test_nothing_is_overwritten_unasked(folder):
    (folder / 'a.pth').write_text('precious')
    with pytest.raises(FileExistsError, match="'a.pth' exists already"):
        write_checkpoint(WEIGHTS, 'a.pth')
    assert (folder / 'a.pth').read_text() == 'precious'
    write_checkpoint(WEIGHTS, 'a.pth', overwrite=True)
    assert set(read_checkpoint('a.pth')) == {'model'}
    with pytest.raises(IsADirectoryError, match='must be a file to write, it is a folder'):
        check_destination(str(folder), overwrite=True)


def test_an_interrupted_write_leaves_no_trace(folder, monkeypatch):
    def interrupted(checkpoint, stream):
        stream.write(b'half')
        raise KeyboardInterrupt

    (folder / 'a.pth').write_text('precious')
    monkeypatch.setattr(torch, 'save', interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(WEIGHTS, 'a.pth', overwrite=True)
    assert [file.name for file in folder.iterdir()] == ['a.pth']
    assert (folder / 'a.pth').read_text() == 'precious'


def test_a_file_may_be_replaced_by_what_was_read_from_it():
    torch.save(dict(WEIGHTS, big=torch.rand(1000, 1000)), 'a.pth')
    checkpoint = read_checkpoint('a.pth')
    expected = checkpoint['big'].clone()
    write_checkpoint(checkpoint, 'a.pth', overwrite=True)
    assert torch.equal(read_checkpoint('a.pth')['big'], expected)
