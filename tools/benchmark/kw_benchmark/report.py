"""A report of figures, as Markdown for readers and JSON for programs."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .machine import Rates
from .parity import Check
from .tables import markdown_table
from .timing import Ratio

NO_GPU = 'no GPU at hand, the script is ready'
NO_MEMORY = 'this system does not tell the memory of a process'
HOW_TO_READ = (
    'Times are medians; ratios are medians of neighbours in time (lowest..highest). The floor is '
    'the static network and the least that mixing kernels takes beside it.')

Row = dict[str, Any]


@dataclass
class Report:
    """Everything that was measured in a run.

    Attributes:
        machine: Its name, versions, the date; see ``machine.describe``.
        subject: What was measured.
        rates: The machine's rates, by precision.
        checks: Parity checks, by what was compared; all passed.
        rows: Rows of backbones, see ``backbones.compare``. What could not be measured has
            ``missing`` instead of figures.
        layers: Rows of layers, see ``layers.compare_layers``.
        detectors: Rows of whole detectors, see ``detectors.compare_detectors``.
    """

    machine: Mapping[str, Any]
    subject: str
    rates: dict[str, Rates] = field(default_factory=dict)
    checks: dict[str, Sequence[Check]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    layers: list[Row] = field(default_factory=list)
    detectors: list[Row] = field(default_factory=list)

    def json(self) -> str:
        """Everything as JSON, with times in seconds and sizes in bytes."""
        return json.dumps(asdict(self), indent=1)

    def markdown(self) -> str:
        """A line about the machine, then tables with their headings."""
        machine = self.machine
        words = [machine['cpu'], machine.get('gpu'), f'{machine["threads"]} threads',
                 f'torch {machine["torch"]}', machine['date'],
                 *(f'{name}: {found.operations / 1e9:.0f} G multiply-adds/s, '
                   f'{found.bandwidth / 1e9:.1f} GB/s' for name, found in self.rates.items())]
        parts = [f'# {self.subject}', f'{"; ".join(filter(None, words))}.\n\n{HOW_TO_READ}',
                 '\n'.join(describe_checks(*named) for named in self.checks.items())]
        missing, rows = ([row for row in self.rows if ('missing' in row) == is_missing]
                         for is_missing in (True, False))
        tables = {'Inference': [_figures(row) for row in rows if row['kind'] == 'inference'],
                  'Training step': [_figures(row) for row in rows if row['kind'] == 'training'],
                  'Peak memory of training': [_memory(r) for r in rows if r['kind'] == 'memory'],
                  'Not measured': [dict(_head(row), why=row['missing']) for row in missing],
                  **{f'Layers, {kind}': [{**_layer(row), **_figures(row[kind])}
                                         for row in self.layers if kind in row]
                     for kind in ('inference', 'training')},
                  'Whole detectors': [_figures(row) for row in self.detectors]}
        parts += [f'## {title}\n\n{markdown_table(rows)}' for title, rows in tables.items() if rows]
        return '\n\n'.join(filter(None, parts)) + '\n'


def describe_checks(name: str, checks: Sequence[Check]) -> str:
    """One line with the largest differences that were found."""
    worst = max(checks, key=lambda check: check.error / check.tolerance)
    return (f'Parity of {name}: {len(checks)} comparisons passed; the closest call is '
            f'{worst.name}, {worst.error:.1e} of at most {worst.tolerance:.1e}.')


def _head(row: Row) -> dict[str, str]:
    found = {}
    if 'config' in row:
        found['config'] = row['config'].rsplit('/', 1)[-1].removesuffix('.py')
    if 'workload' in row:
        found['workload'] = row['workload']
    if 'budget' in row:
        found['b'] = f'{row["budget"]:.3g}'
    return found


def _figures(row: Row) -> dict[str, str]:
    """Times, ratios and floors of whatever programs were timed."""
    many = len(row.get('floors', ())) > 1
    return {**_head(row),
            **{_short(f'{name} ms'): f'{times["total"] * 1e3:.4g}'
               for name, times in row['seconds'].items()},
            **{_short(name): str(Ratio(**ratio)) for name, ratio in row['ratios'].items()},
            **{f'floor, {way.replace("_", " ")}' if many else 'floor': f'{floor:.3g}'
               for way, floor in row.get('floors', {}).items()},
            **({'optimised MB': _megabytes(row['optimised_bytes'])} if 'optimised_bytes' in row
               else {}),
            **({'objects': str(row['num_objects'])} if 'num_objects' in row else {})}


def _memory(row: Row) -> dict[str, str]:
    return {**_head(row), **{f'{name} MB': _megabytes(found['total'])
                             for name, found in row['memory'].items()},
            **{name: f'{ratio["median"]:.3g}' for name, ratio in row['ratios'].items()}}


def _layer(row: Row) -> dict[str, str]:
    return {'layer': row['layer'], 'number': str(row['count']), 'b': f'{row["budget"]:.3g}',
            **{title: 'x'.join(map(str, row[title])) for title in ('weight', 'stride', 'input')},
            'm': str(row['mixtures']), 'n': str(row['cells']), 'h': str(row['hidden'])}


def _short(title: str) -> str:
    return title.replace('static, folded', 'folded').replace('KW, optimised', 'optimised')


def _megabytes(num_bytes: int) -> str:
    return f'{num_bytes / 1e6:.4g}'
