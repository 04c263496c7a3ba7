"""What a comparison found: figures, intervals, curves, and what they rest on."""
from __future__ import annotations

import hashlib
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ...config_types import all_dicts, type_name
from ...files import replace_text, write_json
from .arms import REPORTED, Arm, list_differences
from .runs import LOGGED, Failure, Run, headlines

RESAMPLES = 10_000
# What is made dynamic with a budget of at least 1 predicts the same, up to roundings.
START_TOLERANCE = 0.001
# Of Okabe and Ito, which people with any kind of colour vision can tell apart.
COLOURS = ('#000000', '#E69F00', '#0072B2', '#009E73', '#D55E00', '#CC79A7', '#56B4E9')


def bootstrap_interval(differences: Sequence[float], confidence: float = 0.95
                       ) -> tuple[float, float]:
    """The interval of the mean that resampling gives; the same for the same differences.

    With few of them it is too narrow: three cannot show what a fourth would have been.
    """
    values = np.asarray(differences)
    draws = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[draws].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def write_report(folder: Path, arms: Sequence[Arm], runs: Sequence[Run],
                 failures: Sequence[Failure], about: Mapping[str, str]) -> str:
    """Writes ``results.json``, ``curves.png`` and ``report.md``.

    Args:
        folder: Where to write.
        arms: The first is what the others are compared with.
        runs: Those that ended well.
        failures: The others.
        about: Further lines on where and with what this was run.

    Returns:
        The text of the report.
    """
    write_json(folder / 'results.json', dict(
        about=dict(about), arms=[dict(name=arm.name, num_parameters=arm.num_parameters)
                                 for arm in arms],
        runs=[asdict(run) for run in runs], failures=[asdict(f) for f in failures]), indent=1)
    names = list(dict.fromkeys(name for run in runs for name in headlines(run.metrics)))
    parts = [f'# {" and ".join(arm.name for arm in arms[1:])} against {arms[0].name}']
    parts += [_metric_table(name, arms, runs) for name in names]
    parts += [_cost_table(arms, runs)]
    if failures:
        parts.append('\n'.join(['## What failed', '', *(
            f'* {f.arm}, seed {f.seed}: {f.error}' for f in failures)]))
    if draw_curves(folder / 'curves.png', arms, runs):
        parts.append('## Curves\n\n![loss and metrics by step, a line for each seed](curves.png)')
    parts += [_recipe(arms), '\n'.join(['## Made with', '', *(
        f'* {key}: {value}' for key, value in {**about, **_data(arms[0])}.items())])]
    text = '\n\n'.join(parts) + '\n'
    replace_text(folder / 'report.md', text)
    return text


def _row(cells: Sequence[str]) -> str:
    return f'| {" | ".join(cells)} |'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return '\n'.join([_row(header), _row(['---'] * len(header)), *map(_row, rows)])


def _metric_table(metric: str, arms: Sequence[Arm], runs: Sequence[Run]) -> str:
    found = {(run.arm, run.seed): run for run in runs if metric in run.metrics}
    seeds = sorted({run.seed for run in runs})
    has_start = any(metric in run.start for run in runs)
    rows = []
    for arm in arms:
        values = {seed: found[arm.name, seed].metrics[metric] for seed in seeds
                  if (arm.name, seed) in found}
        row = [arm.name]
        if has_start:
            row.append(next((f'{run.start[metric]:.4f}' for run in runs
                             if run.arm == arm.name and metric in run.start), '-'))
        row.append(f'{statistics.mean(values.values()):.4f}' if values else '-')
        row += [f'{values[seed]:.4f}' if seed in values else '-' for seed in seeds]
        paired = [values[seed] - found[arms[0].name, seed].metrics[metric] for seed in values
                  if (arms[0].name, seed) in found]
        row.append(_difference(paired) if arm is not arms[0] else '')
        rows.append(row)
    header = ['arm', *(['start'] if has_start else []), 'mean', *(f'seed {s}' for s in seeds),
              f'difference to {arms[0].name}, mean [95 % of resampled means]']
    return '\n\n'.join([f'## {metric}', _table(header, rows), *_lost_starts(metric, arms, runs)])


def _lost_starts(metric: str, arms: Sequence[Arm], runs: Sequence[Run]) -> list[str]:
    """A sentence for each arm that does not start where the first one does."""
    starts = {run.arm: run.start[metric] for run in runs if metric in run.start}
    first = starts.get(arms[0].name)
    return [f'**{name} starts {value - first:+.4f} from {arms[0].name}**: its budget is below 1, '
            'or it is not the same model made dynamic.' for name, value in starts.items()
            if first is not None and abs(value - first) > START_TOLERANCE]


def _difference(paired: Sequence[float]) -> str:
    if not paired:
        return '-'
    mean = f'{statistics.mean(paired):+.4f}'
    if len(paired) == 1:
        return f'{mean} (one seed)'
    low, high = bootstrap_interval(paired)
    return f'{mean} [{low:+.4f}, {high:+.4f}]'


def _cost_table(arms: Sequence[Arm], runs: Sequence[Run]) -> str:
    def median(arm: Arm, name: str) -> float | None:
        values = [value for run in runs if run.arm == arm.name
                  and (value := getattr(run, name)) is not None]
        return statistics.median(values) if values else None

    rows = []
    for arm in arms:
        seconds, memory = median(arm, 'seconds'), median(arm, 'memory')
        rows.append([arm.name, f'{arm.num_parameters:,}',
                     '-' if seconds is None else f'{seconds:.3f}',
                     '-' if memory is None else f'{memory / 2**20:,.0f}'])
    return '## Cost\n\n' + _table(
        ['arm', 'parameters', 'seconds per iteration', 'peak memory of a process (MiB)'], rows)


def _recipe(arms: Sequence[Arm]) -> str:
    """What all arms have in common, and everything in which one differs from the first."""
    cfg = arms[0].cfg
    lines = [f'* batch size {cfg.train_dataloader.batch_size}, {dict(cfg.train_cfg)}',
             f'* optimizer: {cfg.optim_wrapper.to_dict()}']
    for arm in arms[1:]:
        lines.append(f'* {arm.name} differs from {arms[0].name} in:')
        lines += [f'    * {line}' for key in REPORTED for line in list_differences(
            cfg.get(key), arm.cfg.get(key), key)] or ['    * nothing']
    return '\n'.join(['## Recipe', '', 'All arms of a seed have the same data, augmentations, '
                      'initial heads and schedule.', '', *lines])


def _data(arm: Arm) -> dict[str, str]:
    """The annotation files by their digests, so that the data can be recognised."""
    lines = {}
    for loader in ('train_dataloader', 'test_dataloader'):
        for _, leaf in all_dicts(arm.cfg[loader].dataset):
            if 'ann_file' not in leaf and 'data_root' not in leaf:
                continue
            path = Path(str(leaf.get('data_root') or ''), str(leaf.get('ann_file') or ''))
            digest = f', SHA-256 {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}' \
                if path.is_file() else ''
            lines[loader.replace('_dataloader', ' data')] = f'{type_name(leaf)}, {path}{digest}'
    return lines


def draw_curves(path: Path, arms: Sequence[Arm], runs: Sequence[Run]) -> bool:
    """Draws loss and metrics by step, a line for each run; False if there is nothing to draw."""
    names = [name for name in dict.fromkeys(name for run in runs for name in run.curve)
             if name in LOGGED or any(len(run.curve.get(name, ())) > 1 for run in runs)]
    if not names:
        return False
    from matplotlib.figure import Figure  # without pyplot, which keeps figures and needs a screen
    figure = Figure(figsize=(5 * len(names), 3.6), layout='constrained')
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for arm, colour in zip(arms, COLOURS * len(arms)):
            for index, run in enumerate(run for run in runs if run.arm == arm.name):
                points = run.curve.get(name)
                if points:
                    steps, values = zip(*points)
                    axis.plot(steps, values, color=colour, lw=1.2, alpha=0.8,
                              label=arm.name if index == 0 else None)
        axis.set(xlabel='iteration' if name in LOGGED else 'epoch or iteration of the test',
                 ylabel=name)
        if name == 'loss':
            axis.set_yscale('log')
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return True
