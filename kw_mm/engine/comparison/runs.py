"""The trainings of a comparison: each arm with each seed, whatever is finished used again."""
from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...files import read_json, write_json
from ..scalars import read_scalars
from .arms import Arm

RECORD, START = 'result.json', 'start.json'
# What is drawn of the lines with a loss; all but that is from KWMixingHook.
LOGGED = ('loss', 'start_part', 'variation')


class Trainer(Protocol):
    """What trains and tests; raises whatever went wrong."""

    def train(self, config: str, work_dir: Path, changes: Mapping[str, Any]
              ) -> tuple[str, int | None]:
        """Trains, or goes on.

        Returns:
            The last checkpoint, and the peak of memory in bytes if it is known.
        """

    def test(self, config: str, checkpoint: str, work_dir: Path) -> dict[str, float]:
        """The metrics of a checkpoint on the test data."""


@dataclass(frozen=True)
class Run:
    """What one training came to.

    Attributes:
        arm: Name of the arm.
        seed: Of the run.
        metrics: Of its last checkpoint.
        start: The same before training; empty if there was nothing to start from.
        seconds: Of an iteration, in the median; None if the log has none.
        memory: Bytes: on a GPU of its tensors, else of the largest process; None if not known.
        curve: By metric, and for what is logged in training: pairs of step and value.
    """

    arm: str
    seed: int
    metrics: dict[str, float]
    start: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    memory: int | None = None
    curve: dict[str, list[list[float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """A training or test that ended in an error."""

    arm: str
    seed: int
    error: str


def run_all(arms: Sequence[Arm], seeds: Sequence[int], folder: Path, trainer: Trainer,
            starts: Mapping[str, str] | None = None, jobs: int = 1,
            report: Callable[[str], None] = print) -> tuple[list[Run], list[Failure]]:
    """Trains and tests each arm with each seed, seed by seed, so that arms can soon be compared.

    A run that has its record is not repeated; one that was interrupted goes on from its newest
    checkpoint; one that fails costs only itself.

    Args:
        arms: What to train.
        seeds: One training of each arm for each.
        folder: Where to write, ``ARM/seed_SEED`` for each run.
        trainer: Trains and tests.
        starts: Checkpoints from which arms start, by name.
        jobs: How many runs at a time.
        report: Takes a line when a run begins or ends.
    """
    starts = starts or {}
    for arm in arms:
        (folder / arm.name).mkdir(exist_ok=True)
        if arm.name in starts and read_json(folder / arm.name / START) is None:
            write_json(folder / arm.name / START, trainer.test(
                arm.path, starts[arm.name], folder / arm.name / 'start'), indent=1)
    tasks = [(seed, arm) for seed in seeds for arm in arms]

    def run(number: int, seed: int, arm: Arm) -> Run | Failure:
        work_dir = folder / arm.name / f'seed_{seed}'
        where = f'[{number}/{len(tasks)}] {arm.name}, seed {seed}'
        known = read_json(work_dir / RECORD)
        if known is None:
            report(f'{where}: training')
            try:
                known = asdict(_run(arm, seed, work_dir, trainer, starts.get(arm.name)))
            except Exception as error:  # of whatever kind: the other runs have not failed
                report(f'{where}: failed, {error}')
                return Failure(arm.name, seed, str(error))
            write_json(work_dir / RECORD, known, indent=1)
        report(f'{where}: ' + ', '.join(
            f'{name} {value:.4g}' for name, value in headlines(known['metrics']).items()))
        return Run(**known)

    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda task: run(*task), (
            (number, *task) for number, task in enumerate(tasks, 1))))
    return ([outcome for outcome in done if isinstance(outcome, Run)],
            [outcome for outcome in done if isinstance(outcome, Failure)])


def _run(arm: Arm, seed: int, work_dir: Path, trainer: Trainer, start: str | None) -> Run:
    work_dir.mkdir(parents=True, exist_ok=True)
    changes: dict[str, Any] = {'randomness.seed': seed}
    if start:
        # By the model's init_cfg, because a resumed run would take load_from for its checkpoint.
        changes['model.init_cfg.type'] = 'Pretrained'
        changes['model.init_cfg.checkpoint'] = start
    checkpoint, memory = trainer.train(arm.path, work_dir, changes)
    metrics = trainer.test(arm.path, checkpoint, work_dir / 'test')
    lines = read_scalars(work_dir)
    times = [line['time'] for line in lines if 'loss' in line and 'time' in line]
    on_gpu = [line['memory'] for line in lines if 'memory' in line]
    before = read_json(work_dir.parent / START) if start else {}
    return Run(arm.name, seed, metrics, before, statistics.median(times) if times else None,
               max(on_gpu) * 2**20 if on_gpu else memory, _curves(lines))


def headlines(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are compared: AP of boxes and masks, or mean IoU, or else all."""
    chosen = {name: value for name, value in metrics.items() if _is_headline(name)}
    return chosen or dict(metrics)


def _is_headline(name: str) -> bool:
    return name.endswith(('bbox_mAP', 'segm_mAP', 'mIoU')) or name == 'pascal_voc/mAP'


def _curves(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[list[float]]]:
    curves: dict[str, list[list[float]]] = {}
    for line in lines:
        values = {name: line[name] for name in LOGGED if name in line} if 'loss' in line else {
            name: value for name, value in line.items() if _is_headline(name)}
        for name, value in values.items():
            if isinstance(value, (int, float)):
                curves.setdefault(name, []).append([line['step'], value])
    return {name: sorted(points) for name, points in curves.items()}
