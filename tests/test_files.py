"""Files that replace others: at any moment either the old or the new one is there."""
import errno
import os
import stat
from pathlib import Path

import pytest
import torch

from kw_mm.checkpoint import read_checkpoint, write_checkpoint
from kw_mm.engine.killing import Moment, _run
from kw_mm.files import (
    NotWrittenError,
    read_json,
    remove_unfinished,
    replace_text,
    replacing,
    write_json,
)

# Not on Windows, where processes cannot be forked either.
resource = pytest.importorskip('resource')


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    path = tmp_path / 'folder'
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_made_and_replaced(folder):
    for text in ('first', 'second, longer', ''):
        replace_text('a.txt', text)
        assert Path('a.txt').read_text() == text
    assert names(folder) == ['a.txt']


# Every moment at which a writer can be killed, by the stages of killing.py.
MOMENTS = [Moment(*moment) for moment in (
    ('opening', 'a.txt', 1), ('opened', 'a.txt', 1), ('writing', 'a.txt', 1),
    ('half written', 'a.txt', 1), ('writing', 'a.txt', 2), ('half written', 'a.txt', 2),
    ('syncing', 'a.txt', 1), ('synced', 'a.txt', 1), ('naming', 'a.txt', 1),
    ('named', 'a.txt', 1))]


def write_twice(folder):
    with replacing(Path(folder, 'a.txt')) as stream:
        stream.write(b'new ')
        stream.write(b'content')


@pytest.mark.parametrize('moment', MOMENTS, ids='{0.stage} {0.number}'.format)
@pytest.mark.parametrize('before', [None, 'old'])
def test_killed_at_any_moment(folder, moment, before):
    if before:
        replace_text('a.txt', before)
    assert _run(write_twice, folder, moment=moment) == -9
    after = Path('a.txt').read_text() if Path('a.txt').exists() else None
    assert after == ('new content' if moment.stage == 'named' else before)
    # The next writer removes leftovers, whatever it writes.
    replace_text('b.txt', 'other')
    assert names(folder) == (['a.txt'] if after else []) + ['b.txt']


def test_moments_are_all_there_are(folder):
    assert _run(write_twice, folder, record=folder.parent / 'moments.json') == 0
    passed = [Moment(*moment) for moment in read_json(folder.parent / 'moments.json')]
    # The last sync is that of the folder.
    assert [*MOMENTS, Moment('syncing', 'a.txt', 2),
            Moment('synced', 'a.txt', 2)] == passed


def test_a_file_in_the_making_is_nobodys_to_remove(folder):
    with replacing('a.txt') as stream:
        stream.write(b'half')
        remove_unfinished(folder)
        replace_text('b.txt', 'other')
        replace_text('a.txt', 'by another process')
    assert Path('a.txt').read_text() == 'half'
    assert names(folder) == ['a.txt', 'b.txt']


def test_without_locks_age_decides(folder, monkeypatch):
    def no_locks(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr('kw_mm.files.fcntl.flock', no_locks)
    for name, age in (('.a.0.unfinished', 10), ('.b.0.unfinished', 2 * 24 * 3600)):
        Path(name).touch()
        os.utime(name, (os.stat(name).st_mtime - age,) * 2)
    replace_text('c.txt', 'other')
    assert names(folder) == ['.a.0.unfinished', 'c.txt']


def test_an_error_of_the_writer_leaves_everything_as_it_was(folder):
    replace_text('a.txt', 'old')
    for error in (ValueError('mine'), KeyboardInterrupt()):
        with pytest.raises(type(error)), replacing('a.txt') as stream:
            stream.write(b'half')
            raise error
    assert Path('a.txt').read_text() == 'old' and names(folder) == ['a.txt']


@pytest.fixture
def full_disk():
    """Limits the size of files. The system's message differs from that for a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk(folder, full_disk):
    replace_text('a.txt', 'old')
    with pytest.raises(NotWrittenError, match="'a.txt' cannot be written: File too large; what was "
                                              'there before is unchanged'):
        replace_text('a.txt', 'x' * 60_000)
    with pytest.raises(NotWrittenError, match="'b.txt' cannot be written: File too"):
        replace_text('b.txt', 'x' * 60_000)
    assert Path('a.txt').read_text() == 'old' and names(folder) == ['a.txt']


def test_full_disk_under_torch_save(folder, full_disk):
    # torch raises a RuntimeError of its own, "unexpected pos".
    write_checkpoint(dict(w=torch.zeros(3)), 'a.pth')
    with pytest.raises(NotWrittenError, match="'a.pth' cannot be written: File too large"):
        write_checkpoint(dict(w=torch.zeros(100, 1000), v=torch.zeros(9)), 'a.pth', overwrite=True)
    assert read_checkpoint('a.pth')['w'].shape == (3,) and names(folder) == ['a.pth']


@pytest.mark.parametrize('code, words', [(errno.EROFS, 'Read-only file system'),
                                         (errno.EACCES, 'Permission denied'),
                                         (errno.ENOSPC, 'No space left on device')])
def test_folder_that_takes_no_file(folder, monkeypatch, code, words):
    replace_text('a.txt', 'old')

    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr('kw_mm.files._open_unfinished', refuse)
    with pytest.raises(NotWrittenError, match=f"'a.txt' cannot be written: {words}; what"):
        replace_text('a.txt', 'new')
    assert Path('a.txt').read_text() == 'old'


def test_no_folder_and_a_folder_in_its_place(folder):
    with pytest.raises(NotWrittenError, match="'no/a.txt' cannot be written: No such file or dir"):
        replace_text('no/a.txt', 'new')
    (folder / 'a').mkdir()
    with pytest.raises(NotWrittenError, match="'a' cannot be written: 'a' is a folder"):
        replace_text('a', 'new')
    assert names(folder) == ['a']


def test_links_permissions_and_devices_stay(folder):
    replace_text('a.txt', 'old')
    os.chmod('a.txt', 0o640)
    os.symlink('a.txt', 'link')
    replace_text('link', 'new')
    assert os.path.islink('link') and Path('a.txt').read_text() == 'new'
    assert stat.S_IMODE(os.stat('a.txt').st_mode) == 0o640
    replace_text('/dev/null', 'gone')
    assert stat.S_ISCHR(os.stat('/dev/null').st_mode)


@pytest.mark.parametrize('content', ['', '{"a": ', '\0\0\0'])
def test_json(content):
    assert read_json('a.json') is None
    Path('a.json').write_text(content)
    assert read_json('a.json') is None
    write_json('a.json', dict(a=1.5))
    assert read_json('a.json') == dict(a=1.5)
