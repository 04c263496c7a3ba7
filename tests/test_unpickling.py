"""Reading checkpoints safely on versions of torch without a list of allowed names."""
import io
import os
import pickle
import struct
from argparse import Namespace
from collections import OrderedDict

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from torch import nn

import kw_mm  # noqa: F401  (allows mmengine's names)
from kw_mm import unpickling
from kw_mm.checkpoint import TornCheckpointError, check_checkpoint, read_checkpoint


@pytest.fixture(autouse=True)
def before_26(tmp_path, monkeypatch):
    """As if torch were old, in an empty folder."""
    monkeypatch.setattr('kw_mm.unpickling.IS_NEEDED', True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def history():
    buffer = HistoryBuffer()
    for value in (1., 2.):
        buffer.update(value)
    return buffer


def contents():
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.rand(2, 2, 4, 4)).sum().backward()
    optimizer.step()
    return dict(
        state_dict=net.state_dict(), optimizer=optimizer.state_dict(), parameter=net[0].weight,
        message_hub=dict(log_scalars=OrderedDict(loss=history()), info=dict(best=np.float32(0.5))),
        meta=dict(classes=('a', 'b'), arrays=[np.arange(2, dtype=d) for d in ('i1', 'f8', '?')],
                  names={1, 2}, raw=b'\xff\x00', number=1 + 2j, big=2**70, device=torch.device(
                      'cpu'), size=torch.Size([1, 2]), dtype=torch.bfloat16, half=torch.ones(
                          2, dtype=torch.half), text='\u00e9', none=None, flag=True, low=-3.5))


def plain(value):
    if isinstance(value, dict):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value), [plain(child) for child in value]
    if isinstance(value, HistoryBuffer):
        return plain(value.data), sorted(value._statistics_methods), value.mean()
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return type(value), value.dtype, value.tolist()
    return type(value), value


@pytest.mark.parametrize('legacy', [False, True])
def test_whatever_a_checkpoint_has(legacy):
    checkpoint = contents()
    torch.save(checkpoint, 'a.pth', _use_new_zipfile_serialization=not legacy)
    read = check_checkpoint('a.pth', resume=True)
    assert plain(read) == plain(checkpoint)
    assert read['state_dict']._metadata == checkpoint['state_dict']._metadata


@pytest.mark.parametrize('legacy', [False, True])
def test_classes_that_are_allowed(legacy):
    options = Namespace(lr=0.1, nested=Namespace(a=[1]))
    torch.save(dict(args=options), 'a.pth', _use_new_zipfile_serialization=not legacy)
    assert read_checkpoint('a.pth', allowed=[Namespace])['args'] == options
    with pytest.raises(ValueError, match="'a.pth' holds argparse.Namespace, which torch.load re"):
        read_checkpoint('a.pth')


class Call:
    """Pickled as a call, with a state and items if given."""

    def __init__(self, function, arguments, state=None, items=None):
        self.parts = function, arguments, state
        self.items = items

    def __reduce__(self):
        return self.parts if self.items is None else (*self.parts, iter(self.items))


RUN = (os.mkdir, ('ran',))
HOSTILE = {
    'a function': Call(*RUN),
    'inside of one that is allowed': Call(OrderedDict, (), dict(a=Call(*RUN))),
    'by getattr': Call(torch._tensor._rebuild_from_type_v2, (
        Call(getattr, (Call(getattr, (getattr, '__self__')), 'eval')), torch.Tensor,
        ("__import__('os').mkdir('ran')",), None)),
    'through a function of torch': Call(torch._tensor._rebuild_from_type_v2, (
        os.mkdir, torch.Tensor, ('ran',), None)),
    'a state of a function': Call(torch._utils._rebuild_tensor_v2, (1,), dict(a=1)),
    'bytes by another codec': Call(__import__('_codecs').encode, ('x', 'rot13')),
    'items of an array': Call(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b'b'), None, [1]),
}


@pytest.mark.parametrize('crafted', HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize('legacy', [False, True])
def test_no_code_is_run(before_26, crafted, legacy):
    torch.save(dict(state_dict=crafted), 'a.pth', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match="'a.pth' (holds|is refused|is cut off or no check)"):
        check_checkpoint('a.pth')
    assert [path.name for path in before_26.iterdir()] == ['a.pth']


def text(value):
    return pickle.BINUNICODE + struct.pack('<I', len(value)) + value.encode()


def name(module, attribute):
    return pickle.GLOBAL + f'{module}\n{attribute}\n'.encode()


OTHER_WAYS = {
    'an instance': b'(' + text('ran') + pickle.INST + b'os\nmkdir\n.',
    'an object': b'(' + name('os', 'mkdir') + text('ran') + pickle.OBJ + b'.',
    'a module in a name': name('torch.serialization', 'os.mkdir') + text('ran') + b'\x85R.',
    'a state of a class': (name('collections', 'OrderedDict') + b'}' + text('x') + b'K\x01s' +
                           pickle.BUILD + b'.'),
    'a state of a function': (name('torch._utils', '_rebuild_tensor_v2') + b'N}' + text(
        '__defaults__') + b')s\x86' + pickle.BUILD + b'.'),
    'a call of what was built': (name('torch', 'Size') + b')R)R.'),
    'an object of what is no class': name('torch._utils', '_rebuild_tensor_v2') + b')\x81.',
    'an extension': pickle.EXT1 + b'\x01.',
    'an identity that is no storage': text('module') + pickle.BINPERSID + b'.',
    'an item of a class': (name('collections', 'OrderedDict') + text('x') + b'K\x01s.'),
}


@pytest.mark.parametrize('code', OTHER_WAYS.values(), ids=OTHER_WAYS)
def test_other_ways_to_make_objects_are_refused(before_26, code):
    with pytest.raises(pickle.UnpicklingError, match='Unsupported'):
        unpickling.load(io.BytesIO(pickle.PROTO + b'\x02' + code))
    assert not list(before_26.iterdir())


def test_programs_are_no_checkpoints():
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), 'a.pth')
    with pytest.raises(ValueError, match="'a.pth' is a TorchScript program, no checkpoint"):
        check_checkpoint('a.pth')


def test_torn_files():
    torch.save(contents(), 'a.pth', _use_new_zipfile_serialization=False)
    with open('a.pth', 'rb') as stream:
        data = stream.read()
    for size in (0, 1, 10, 500, len(data) - 1):
        with open('b.pth', 'wb') as stream:
            stream.write(data[:size])
        with pytest.raises(TornCheckpointError, match="'b.pth' is cut off or no checkpoint"):
            check_checkpoint('b.pth')
