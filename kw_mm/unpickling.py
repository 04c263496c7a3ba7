"""Reads checkpoints safely on versions of torch that cannot be given a list of allowed names.

There ``torch.load`` either builds whatever a file asks for, which can run any code, or refuses the
logged history that every checkpoint of mmengine contains. Passed as ``pickle_module``, this module
builds only what torch considers safe and what was allowed here.
"""
from __future__ import annotations

import pickle
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import _weights_only_unpickler as torch_unpickler

__all__ = ['IS_NEEDED', 'Unpickler', 'allow', 'allowing', 'load']

# Since 2.6 torch can be told, by name and object, what a file may hold (``kw_mm.compat`` does).
IS_NEEDED = torch.__version__ < '2.6'

# torch.save writes protocol 2, which uses the module names of Python 2.
_PYTHON_3 = {'__builtin__': 'builtins', 'copy_reg': 'copyreg'}

_allowed: dict[str, Any] = {}


def allow(names: Mapping[str, Any]) -> None:
    """Allows names in all files from now on.

    Args:
        names: The object to build for each full name. It may differ from the one that has this name
            in Python.
    """
    _allowed.update(names)


@contextmanager
def allowing(names: Mapping[str, Any]) -> Iterator[None]:
    """Allows names within a context."""
    before = dict(_allowed)
    _allowed.update(names)
    try:
        yield
    finally:
        _allowed.clear()
        _allowed.update(before)


def _encode(text: str, encoding: str) -> bytes:
    """Replaces ``codecs.encode``, with which protocol 2 stores bytes."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f"a checkpoint encodes bytes as 'latin1', not {encoding!r}")
    return text.encode('latin1')


# Names of plain Python, some of which old versions of torch do not allow.
_PLAIN = {'_codecs.encode': _encode, 'builtins.bytearray': bytearray, 'builtins.complex': complex,
          'builtins.set': set, 'collections.Counter': Counter,
          'collections.OrderedDict': OrderedDict, 'torch.device': torch.device,
          **{str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}}


class Unpickler(pickle._Unpickler):  # the one in C calls whatever is on the stack
    """Builds objects of allowed names only, and neither calls nor fills any others."""

    dispatch = dict(pickle._Unpickler.dispatch)  # methods by opcode

    def __init__(self, file: BinaryIO, **kwargs: Any) -> None:
        super().__init__(file, **kwargs)
        self._names = {**torch_unpickler._get_allowed_globals(), **_PLAIN, **_allowed}
        # By identity, because comparing would call methods of objects that the file has built.
        self._known = set(map(id, self._names.values()))

    def find_class(self, module: str, name: str) -> Any:
        path = f'{_PYTHON_3.get(module, module)}.{name}'
        if path not in self._names:
            raise pickle.UnpicklingError(f'Unsupported global: GLOBAL {path}')
        return self._names[path]

    def _check_known(self, value: Any) -> None:
        if id(value) not in self._known:
            raise pickle.UnpicklingError(f'Unsupported use of a {type(value).__name__}')

    def _check_filled(self, target: Any, *kinds: type) -> None:
        if type(target) not in kinds:
            raise pickle.UnpicklingError(f'Unsupported filling of a {type(target).__name__}')

    def load_reduce(self) -> None:
        self._check_known(self.stack[-2])
        super().load_reduce()

    def load_newobj(self) -> None:
        if not isinstance(self.stack[-2], type):
            self.refuse()
        self._check_known(self.stack[-2])
        super().load_newobj()

    def load_build(self) -> None:
        kind = type(self.stack[-2])
        # No file contains the classes of dtypes.
        self._check_known(np.dtype if issubclass(kind, np.dtype) else kind)
        super().load_build()

    def load_append(self) -> None:
        self._check_filled(self.stack[-2], list)
        super().load_append()

    def load_appends(self) -> None:
        self._check_filled(self.metastack[-1][-1], list)
        super().load_appends()

    def load_setitem(self) -> None:
        self._check_filled(self.stack[-3], dict, OrderedDict, Counter)
        super().load_setitem()

    def load_setitems(self) -> None:
        self._check_filled(self.metastack[-1][-1], dict, OrderedDict, Counter)
        super().load_setitems()

    def load_binpersid(self) -> None:
        pid = self.stack[-1]
        # Storages of the old format have numbers. It can also contain modules with their source.
        if type(pid) is not int and not (type(pid) is tuple and pid[:1] in (
                ('storage',), (b'storage',))):
            raise pickle.UnpicklingError('Unsupported persistent id')
        super().load_binpersid()

    def refuse(self) -> None:
        raise pickle.UnpicklingError('Unsupported instruction')

    dispatch.update({
        pickle.REDUCE[0]: load_reduce, pickle.NEWOBJ[0]: load_newobj, pickle.BUILD[0]: load_build,
        pickle.APPEND[0]: load_append, pickle.APPENDS[0]: load_appends,
        pickle.SETITEM[0]: load_setitem, pickle.SETITEMS[0]: load_setitems,
        pickle.BINPERSID[0]: load_binpersid})
    # Further opcodes that create objects; no program that writes checkpoints uses them.
    dispatch.update(dict.fromkeys(
        (code[0] for code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.EXT1, pickle.EXT2,
                              pickle.EXT4, pickle.ADDITEMS, pickle.PERSID)), refuse))


def load(file: BinaryIO, **kwargs: Any) -> Any:
    """Same as ``pickle.load``; torch calls it for files of its old format."""
    return Unpickler(file, **kwargs).load()
