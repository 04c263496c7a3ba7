"""Which checkpoint a run resumes from, whatever a kill has left."""
import os
import re
from pathlib import Path

import pytest
import torch

from kw_mm.checkpoint import check_checkpoint
from kw_mm.resuming import find_whole_checkpoint


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty work directory, with a path relative to the current one."""
    monkeypatch.chdir(tmp_path)
    path = Path('work_dirs', 'run')
    path.mkdir(parents=True)
    return path


def save(path, number, hour=None):
    """A checkpoint after so many iterations, written at a given hour."""
    stamp = f'20260101_{number if hour is None else hour:02}0000'
    torch.save(dict(state_dict=dict(w=torch.rand(1000) + 1), optimizer={}, message_hub={},
                    meta=dict(epoch=number, iter=10 * number, time=stamp)), path)
    return str(path)


@pytest.fixture
def three(folder):
    """Three checkpoints and the marker of a run."""
    paths = [save(folder / f'epoch_{number}.pth', number) for number in (1, 2, 3)]
    (folder / 'last_checkpoint').write_text(paths[-1])
    return paths


def found(folder, *places):
    return find_whole_checkpoint(str(folder), places).path


def test_as_a_run_leaves_it(folder, three):
    result = find_whole_checkpoint(str(folder))
    assert result.path == three[2] and result.passed == []
    assert result.describe() == f'Resuming from {three[2]}, the newest whole checkpoint'


MARKERS = {
    'empty': (b'', 'last_checkpoint is empty'),
    'zeros': (b'\0' * 40, 'last_checkpoint is empty'),
    'torn': (b'work_dirs/run/epo', "last_checkpoint names 'work_dirs/run/epo', which is no file"),
    'a folder': (b'work_dirs/run', "last_checkpoint names 'work_dirs/run', which is no file"),
    'dangling': (b'work_dirs/run/epoch_99.pth', 'names .*epoch_99.pth., which is no file'),
    'binary': (bytes(range(128, 256)), 'last_checkpoint names .*, which is no file'),
    'missing': (None, None),
    'from elsewhere': (b'/gone/run/epoch_3.pth', None),
    'of a file that is none': (b'last_checkpoint', 'is cut off or no checkpoint'),
}


@pytest.mark.parametrize('content, reason', MARKERS.values(), ids=MARKERS)
@pytest.mark.parametrize('template', ['epoch_{}.pth', 'iter_{}.pth'])
def test_whatever_the_marker_holds(folder, content, reason, template):
    # 10 comes before 9 by name.
    paths = {number: save(folder / template.format(number), number) for number in (8, 9, 10)}
    if content is not None:
        (folder / 'last_checkpoint').write_bytes(
            content.replace(b'epoch_3.pth', os.path.basename(paths[10]).encode()))
    result = find_whole_checkpoint(str(folder))
    assert result.path == paths[10]
    assert len(result.passed) == bool(reason) and (
        not reason or re.search(reason, result.describe()))


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1:]


DAMAGE = {
    'empty': (lambda data: b'', 'cut off'),
    'half': (lambda data: data[:len(data) // 2], 'is cut off'),
    'without its end': (lambda data: data[:-1], 'is cut off'),
    'one bit': (flip, 'is damaged: .*data/0 in it is not what was written'),
    'zeros': (lambda data: data[:1000] + bytes(3000) + data[4000:], 'is (damaged|cut off)'),
    'text': (lambda data: b'<html>404</html>', 'cut off or no checkpoint'),
}


@pytest.mark.parametrize('damage, reason', DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize('marked', [True, False], ids=['marked', 'unmarked'])
def test_the_newest_is_torn(folder, three, damage, reason, marked):
    data = Path(three[2]).read_bytes()
    Path(three[2]).write_bytes(damage(data))
    assert Path(three[2]).read_bytes() != data
    if not marked:  # its writer was killed between the two
        (folder / 'last_checkpoint').write_text(three[1])
    result = find_whole_checkpoint(str(folder))
    assert result.path == three[1]
    assert len(result.passed) == 1 and 'epoch_3.pth' in result.passed[0]
    assert re.search(reason, result.passed[0])
    with pytest.raises(ValueError, match=reason):
        check_checkpoint(three[2], resume=True)


class Code:
    def __reduce__(self):
        return os.mkdir, ('ran',)


OTHERS = {
    'weights alone': (lambda path: torch.save(dict(state_dict={}, meta={}), path),
                      r"cannot be resumed from, it has no \['message_hub'\]"),
    'a list': (lambda path: torch.save([1], path), 'must hold a dict, got list'),
    'code': (lambda path: torch.save(dict(state_dict=Code()), path), 'refuses to build'),
    'a folder': (lambda path: path.mkdir(), 'must be a file, it is a folder'),
}


@pytest.mark.parametrize('make, reason', OTHERS.values(), ids=OTHERS)
def test_a_checkpoint_of_another_format(folder, three, make, reason):
    Path(three[2]).unlink()
    make(Path(three[2]))
    result = find_whole_checkpoint(str(folder))
    assert result.path == three[1] and re.search(reason, result.describe())
    # If there is nothing else, a new start would eventually overwrite it.
    for path in three[:2]:
        os.remove(path)
    with pytest.raises(ValueError, match=f"nothing in 'work_dirs/run' can be resumed.*{reason}"):
        find_whole_checkpoint(str(folder))
    assert not Path('ran').exists()


def test_nothing_there(folder):
    assert find_whole_checkpoint(str(folder)).describe() == (
        'Nothing to resume from in work_dirs/run: training starts from the beginning')
    assert found('no/such/folder') is None
    # If all are torn, nothing can be lost by a new start.
    Path(folder, 'epoch_1.pth').write_bytes(b'PK\x03\x04')
    text = find_whole_checkpoint(str(folder)).describe()
    assert text.startswith('Nothing to resume from in work_dirs/run; checkpoint ')
    assert "epoch_1.pth' is cut off" in text and text.endswith('starts from the beginning')


def test_a_checkpoint_whose_marker_was_never_written(folder, three):
    (folder / 'last_checkpoint').write_text(three[1])
    assert found(folder) == three[2]


def test_an_earlier_longer_run_left_its_own(folder, three):
    save(folder / 'epoch_12.pth', 12, hour=0)
    assert found(folder) == three[2]
    # Without a marker the time inside counts, because copies have other file times.
    for path in folder.glob('*.pth'):
        os.utime(path, (1, 1))
    os.remove(folder / 'last_checkpoint')
    assert found(folder) == three[2]
    Path(three[2]).write_bytes(b'')
    (folder / 'last_checkpoint').write_text(three[2])
    assert found(folder) == three[1]


def test_within_a_second_the_iteration_decides(folder):
    for number in (9, 10):
        save(folder / f'iter_{number}.pth', number, hour=1)
    assert found(folder) == str(folder / 'iter_10.pth')


def test_best_checkpoints_are_none_to_resume_from(folder):
    save(folder / 'best_score_epoch_5.pth', 5)
    save(folder / '.epoch_6.pth.0.unfinished', 6)
    path = save(folder / 'epoch_4.pth', 4)
    assert found(folder) == path


def test_other_folders_and_names(folder, tmp_path):
    other = tmp_path / 'checkpoints' / 'run'
    other.mkdir(parents=True)
    paths = [save(other / f'net-{number}.pth', number) for number in (1, 2)]
    assert found(folder) is None
    assert found(folder, (str(other), 'net-{}.pth')) == paths[1]
    # The marker may name any file in any folder.
    (folder / 'last_checkpoint').write_text(paths[0])
    assert found(folder) == paths[0]
    assert found(folder, (str(other), 'net-{}.pth')) == paths[1]
    later = save(other / 'epoch_3.pth', 3)
    os.remove(paths[0])
    assert found(folder) is None
    (folder / 'last_checkpoint').write_text(paths[1])
    Path(paths[1]).write_bytes(b'')
    assert found(folder) == later


def test_a_folder_that_was_moved(folder, three):
    os.rename(folder, 'moved')
    assert found('moved') == os.path.join('moved', 'epoch_3.pth')


def test_remote_checkpoints_are_taken_at_their_word(folder, three):
    (folder / 'last_checkpoint').write_text('s3://bucket/run/epoch_5.pth')
    assert found(folder) == 's3://bucket/run/epoch_5.pth'


@pytest.mark.skipif(not hasattr(torch.serialization, 'set_crc32_options'),
                    reason='this torch always writes them')
def test_checksums_that_were_not_written(folder):
    # torch can omit checksums, and then zipfile would call every record damaged.
    torch.serialization.set_crc32_options(False)
    try:
        path = save(folder / 'epoch_1.pth', 1)
    finally:
        torch.serialization.set_crc32_options(True)
    assert found(folder) == path
