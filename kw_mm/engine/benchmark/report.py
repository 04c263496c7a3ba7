"""A report of figures, as Markdown for readers and JSON for programs."""
from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .backbones import FOLDED, KW, OPTIMISED, STATIC
from .floor import INFERENCE, Rates
from .parity import Check

NO_GPU = 'no GPU at hand, the script is ready'
NOTHING = '-'
FLOORS = tuple(f'floor, {way.replace("_", " ")}' for way in INFERENCE)


@dataclass
class Report:
    """All that was measured in a run.

    Attributes:
        machine: Its name, versions, the date; see ``machine.describe``.
        subject: What was measured.
        rates: What the machine does in a second, by precision.
        checks: Parity, by what was compared; all passed.
        rows: Of backbones, see ``backbones.compare``; goals under ``goal``, and with
            ``missing`` in the place of figures what could not be measured.
        layers: Of layers, see ``layers.compare_layers``.
        detectors: Of whole detectors, see ``whole.compare_detectors``.
    """

    machine: Mapping[str, Any]
    subject: str
    rates: dict[str, Rates] = field(default_factory=dict)
    checks: dict[str, Sequence[Check]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    detectors: list[dict[str, Any]] = field(default_factory=list)

    def json(self) -> str:
        """Everything, times in seconds and sizes in bytes."""
        return json.dumps(asdict(self), indent=1)

    def markdown(self) -> str:
        """Tables under a line on the machine, each with its head."""
        parts = [f'# {self.subject}', describe_machine(self.machine, self.rates)]
        if self.checks:
            parts.append('\n'.join(describe_checks(name, checks)
                                   for name, checks in self.checks.items()))
        measured = [row for row in self.rows if 'missing' not in row]
        for title, table in (
                ('Inference', inference_table(_of_kind(measured, 'inference'))),
                ('Training step', training_table(_of_kind(measured, 'training'))),
                ('Peak memory of training', memory_table(_of_kind(measured, 'memory'))),
                ('Not measured', missing_table(row for row in self.rows if 'missing' in row)),
                ('Layers, inference', layer_table(self.layers, 'inference')),
                ('Layers, forward and backward', layer_table(self.layers, 'training')),
                ('Whole detectors', detector_table(self.detectors))):
            if table:
                parts.append(f'## {title}\n\n{table}')
        return '\n\n'.join(parts) + '\n'


def describe_machine(machine: Mapping[str, Any], rates: Mapping[str, Rates]) -> str:
    """What measured it, its rates, and how to read the tables."""
    words = [machine['cpu'], *([machine['gpu']] if 'gpu' in machine else []),
             f'{machine["threads"]} threads',
             f'torch {machine["torch"]}', machine['date'],
             *(f'{name}: {found.operations / 1e9:.0f} G multiply-adds/s, '
               f'{found.bandwidth / 1e9:.1f} GB/s' for name, found in rates.items())]
    return (f'{"; ".join(words)}.\n\n'
            'Times are medians; ratios are medians of neighbours in time (lowest..highest). The '
            'floor is the static network and the least that mixing kernels takes beside it.')


def describe_checks(name: str, checks: Sequence[Check]) -> str:
    """One line: how far apart what was compared is at most."""
    worst = max(checks, key=lambda check: check.error / check.tolerance)
    return (f'Parity of {name}: {len(checks)} comparisons passed; the closest call is '
            f'{worst.name}, {worst.error:.1e} of at most {worst.tolerance:.1e}.')


def inference_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Static, as it is and folded, against KW, as trained and optimised."""
    header = ('workload', 'b', 'static ms', 'folded ms', 'KW ms', 'optimised ms', 'KW / static',
              'optimised / static', 'optimised / folded', 'goal', *FLOORS, 'optimised MB')
    return markdown_table(header, [
        (row['workload'], number(row['budget']),
         *(milliseconds(row, name) for name in (STATIC, FOLDED, KW, OPTIMISED)),
         *(ratio(row, f'{a} / {b}') for a, b in (
             (KW, STATIC), (OPTIMISED, STATIC), (OPTIMISED, FOLDED))),
         number(row.get('goal')), *(number(row['floors'][way]) for way in INFERENCE),
         megabytes(row['optimised_bytes'])) for row in rows])


def training_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Static against KW: the step, and its passes alone."""
    header = ('workload', 'b', 'static ms', 'KW ms', 'KW / static', 'forward and backward alone',
              'goal', 'floor')
    return markdown_table(header, [
        (row['workload'], number(row['budget']), *(milliseconds(row, name)
                                                   for name in (STATIC, KW)),
         ratio(row, f'{KW} / {STATIC}'), ratio(row, f'{KW} / {STATIC}, forward and backward'),
         number(row.get('goal')), number(row['floors']['cells'])) for row in rows])


def memory_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Peaks of the two."""
    header = ('workload', 'b', 'static MB', 'KW MB', 'KW / static', 'goal')
    return markdown_table(header, [
        (row['workload'], number(row['budget']),
         *(megabytes(row['memory'][name]['total']) for name in (STATIC, KW)),
         number(row['ratios'][f'{KW} / {STATIC}']['median']), number(row.get('goal')))
        for row in rows])


def missing_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """What could not be measured, and why."""
    return markdown_table(('workload', 'b', 'goal', 'why'), [
        (row['workload'], number(row['budget']), number(row['goal']), row['missing'])
        for row in rows])


def layer_table(rows: Iterable[Mapping[str, Any]], kind: str) -> str:
    """Layers of distinct geometry."""
    names = (STATIC, KW, OPTIMISED) if kind == 'inference' else (STATIC, KW)
    header = ('layer', 'number', 'b', 'weight', 'stride', 'input', 'm', 'n', 'h',
              *(f'{name.split(", ")[-1]} ms' for name in names),
              *(f'{name.split(", ")[-1]} / static' for name in names[1:]),
              *(FLOORS if kind == 'inference' else ('floor',)))
    return markdown_table(header, [
        (row['layer'], str(row['count']), number(row['budget']), times(row['weight']),
         times(row['stride']), times(row['input']),
         *(str(row[field]) for field in ('mixtures', 'cells', 'hidden')),
         *(milliseconds(row[kind], name) for name in names),
         *(ratio(row[kind], f'{name} / {STATIC}') for name in names[1:]),
         *map(number, row[kind]['floors'].values())) for row in rows])


def detector_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Whole detectors."""
    header = ('config', 'workload', 'static ms', 'folded ms', 'KW ms', 'optimised ms',
              'KW / static', 'optimised / static', 'optimised / folded', 'objects')
    return markdown_table(header, [
        (row['config'].rsplit('/', 1)[-1].removesuffix('.py'),
         f'{row["kind"]} {times((row["shape"][0], 3, *row["shape"][1:]))}',
         *(milliseconds(row, name) for name in (STATIC, FOLDED, KW, OPTIMISED)),
         *(ratio(row, f'{a} / {b}') for a, b in (
             (KW, STATIC), (OPTIMISED, STATIC), (OPTIMISED, FOLDED))),
         str(row.get('num_objects', NOTHING))) for row in rows])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, or nothing if it has no rows."""
    if not rows:
        return ''
    return '\n'.join(f'| {" | ".join(line)} |' for line in (header, ('---',) * len(header), *rows))


def milliseconds(row: Mapping[str, Any], name: str) -> str:
    """Median time of a program in a row."""
    found = row['seconds'].get(name)
    return NOTHING if found is None else f'{found["total"] * 1e3:.4g}'


def ratio(row: Mapping[str, Any], name: str) -> str:
    """A ratio with its range."""
    found = row['ratios'].get(name)
    return NOTHING if found is None else (
        f'{found["median"]:.2f} ({found["low"]:.2f}..{found["high"]:.2f})')


def number(value: float | None) -> str:
    """A budget, goal or floor."""
    return NOTHING if value is None else f'{value:.3g}'


def megabytes(num_bytes: int) -> str:
    """A size."""
    return f'{num_bytes / 1e6:.4g}'


def times(extents: Sequence[int]) -> str:
    """A shape."""
    return 'x'.join(map(str, extents))


def _of_kind(rows: Iterable[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [row for row in rows if row['kind'] == kind]
