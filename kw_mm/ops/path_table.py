"""Which way to convolve each sample with its own kernel is fastest, as a table.

A table has rules; the first one that holds decides. ``SHIPPED`` is the one of GPUs, which also
serves devices that nobody has measured. ``python tools/benchmark tune`` measures every way on the
machine at hand and writes a table to a file, which ``use_paths`` or ``KW_MM_PATHS=FILE`` in the
environment puts in the place of its device's. CPUs have no table, but the rules of ``convolution``,
until such a file gives them one.
"""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from . import convolution_paths as paths

FORMAT = 1
# Kinds of kernels: 1x1 without groups and padding, others without groups, and all the rest, as
# depthwise ones. Of each the paths that take every such kernel, then those that take some.
KINDS = {'pointwise': ('pointwise', 'sample_by_sample', 'grouped'),
         'dense': ('sample_by_sample', 'grouped', 'rows', 'im2col'),
         'grouped': ('sample_by_sample', 'grouped')}
LAYOUTS = ('contiguous', 'channels_last')
# Maps of two dimensions alone.
ONLY_2D = ('im2col',)


def _check(name: str, value: Any, is_right: bool, expected: str) -> None:
    if not is_right:
        raise ValueError(f'{name} must be {expected}, got {value!r}')


class Case(NamedTuple):
    """What a choice depends on."""

    kernel: str      # of KINDS
    batch: int
    positions: int   # of the output
    layout: str      # of LAYOUTS
    training: bool   # whether the kernels get a gradient
    num_dims: int = 2


@dataclass(frozen=True)
class Rule:
    """A path, and when to take it; what is None does not matter.

    Args:
        kernel: The kind of kernels, of ``KINDS``.
        path: The function of ``convolution_paths``, by name.
        batch: Samples at most.
        positions: Positions of the output at most.
        layout: Of the map, of ``LAYOUTS``.
        training: Whether kernels get a gradient.

    Raises:
        ValueError: If a field has none of these values.
    """

    kernel: str
    path: str
    batch: int | None = None
    positions: int | None = None
    layout: str | None = None
    training: bool | None = None

    def __post_init__(self) -> None:
        _check('kernel', self.kernel, self.kernel in tuple(KINDS), f'one of {", ".join(KINDS)}')
        known = KINDS[self.kernel]
        _check('path', self.path, self.path in known,
               f'one of {", ".join(known)} for {self.kernel} kernels')
        for name in ('batch', 'positions'):
            value = getattr(self, name)
            _check(name, value, value is None or (type(value) is int and value >= 1),
                   'an integer >= 1, or null')
        _check('layout', self.layout, self.layout in (None, *LAYOUTS),
               f'one of {", ".join(LAYOUTS)}, or null')
        _check('training', self.training, self.training is None or type(self.training) is bool,
               'true, false or null')

    def holds(self, case: Case) -> bool:
        """Whether a case meets all its conditions."""
        return (self.kernel == case.kernel
                and (self.batch is None or case.batch <= self.batch)
                and (self.positions is None or case.positions <= self.positions)
                and self.layout in (None, case.layout)
                and self.training in (None, case.training)
                and not (case.num_dims != 2 and self.path in ONLY_2D))

    @property
    def is_last(self) -> bool:
        """Whether it holds for every kernel of its kind."""
        return self.path not in ONLY_2D and all(
            value is None for value in (self.batch, self.positions, self.layout, self.training))


@dataclass(frozen=True)
class Table:
    """Rules for a kind of device.

    Args:
        device_type: As torch calls it, ``'cuda'`` or ``'cpu'``.
        source: Where the rules come from, for readers.
        rules: In the order in which they are asked.

    Raises:
        ValueError: If some kernels would be left without a path.
    """

    device_type: str
    source: str
    rules: tuple[Rule, ...]

    def __post_init__(self) -> None:
        for kind in KINDS:
            if not any(rule.is_last for rule in self.rules if rule.kernel == kind):
                raise ValueError(f'rules must end with one for all {kind} kernels, without '
                                 'conditions, got none')

    def choose(self, case: Case) -> Callable[..., Tensor]:
        """The path of a case."""
        for rule in self.rules:
            if rule.holds(case):
                return getattr(paths, rule.path)
        raise AssertionError(f'no rule for {case}')


# Measured in bfloat16 with 2 to 128 images (docs/performance.md); one image, other precisions and
# other GPUs are taken to be alike. A grouped convolution copies channels-last maps twice, which
# costs more than many launches if maps are large; with contiguous ones it is the fastest, but for
# the smallest maps, whose kernels are larger than they are.
SHIPPED = Table('cuda', 'measured: NVIDIA H100 80GB HBM3, bfloat16, torch 2.11.0+cu130', (
    Rule('pointwise', 'sample_by_sample', batch=1, layout='channels_last'),
    Rule('pointwise', 'pointwise'),
    Rule('dense', 'sample_by_sample', batch=1),
    Rule('dense', 'im2col', positions=98, layout='contiguous'),
    Rule('dense', 'grouped', layout='contiguous'),
    Rule('dense', 'sample_by_sample', batch=2),
    Rule('dense', 'rows', positions=98),
    Rule('dense', 'grouped', training=True),
    Rule('dense', 'rows', positions=2100),
    Rule('dense', 'grouped', positions=3600),
    Rule('dense', 'sample_by_sample'),
    Rule('grouped', 'grouped', layout='contiguous'),
    Rule('grouped', 'grouped', positions=3600),
    Rule('grouped', 'sample_by_sample')))

_tables: dict[str, Table] = {}


def table_of(device_type: str) -> Table | None:
    """The table that decides on a kind of device; None for CPUs, unless a file gave them one."""
    if device_type == 'cpu':
        return _tables.get('cpu')
    return _tables.get(device_type) or _tables.get('cuda', SHIPPED)


def use_paths(file: str | os.PathLike | None) -> None:
    """Lets a table that was measured decide from now on, for its kind of device.

    Args:
        file: What ``python tools/benchmark tune`` wrote, or None for what is shipped, on all
            devices.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If it is no such table; the message names the file, field and value.
    """
    if file is None:
        _tables.clear()
        return
    try:
        table = parse_table(json.loads(Path(file).read_text(encoding='utf-8')))
    except ValueError as error:
        raise ValueError(f'{os.fspath(file)} is no table of paths: {error}') from error
    _tables[table.device_type] = table


def parse_table(value: Any) -> Table:
    """A table from what JSON holds; ``describe_table`` is the inverse.

    Raises:
        ValueError: If a field is missing, unknown or has a wrong value.
    """
    if not isinstance(value, Mapping):
        raise ValueError(f'it must be an object, got {type(value).__name__}')
    _check('format', value.get('format'), value.get('format') == FORMAT, f'{FORMAT}')
    for name in ('device_type', 'source'):
        _check(name, value.get(name), isinstance(value.get(name), str), 'a text')
    rules = value.get('rules')
    if not isinstance(rules, list):
        raise ValueError(f'rules must be a list, got {rules!r}')
    return Table(value['device_type'], value['source'],
                 tuple(_parse_rule(i, rule) for i, rule in enumerate(rules)))


def describe_table(table: Table) -> dict[str, Any]:
    """A table as JSON holds it; conditions that do not matter are left out."""
    return dict(format=FORMAT, device_type=table.device_type, source=table.source, rules=[
        {name: value for name, value in asdict(rule).items() if value is not None}
        for rule in table.rules])


def _parse_rule(index: int, value: Any) -> Rule:
    known = [field.name for field in fields(Rule)]
    if not isinstance(value, Mapping) or not {'kernel', 'path'} <= set(value) <= set(known):
        raise ValueError(f'rules[{index}] must be an object with kernel and path, and of '
                         f'{", ".join(known[2:])} what matters, got {value!r}')
    try:
        return Rule(**value)
    except ValueError as error:
        raise ValueError(f'rules[{index}].{error}') from error


_file = os.environ.get('KW_MM_PATHS')
if _file:
    use_paths(_file)
