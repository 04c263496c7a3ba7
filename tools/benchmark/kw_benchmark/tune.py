"""Measures every way to convolve each sample with its own kernel, and writes a table of the best.

    python tools/benchmark tune --device cuda --out paths.json
    KW_MM_PATHS=paths.json python tools/train.py CONFIG     # uses it; or kw_mm.ops.use_paths(file)

For each kind of kernels, size of map, batch, layout, with and without gradients, every way that
takes them is timed: layers of a ResNet50, and depthwise ones of a ConvNeXt, in images of 800x1344
and 224x224. Without a file, kw_mm takes the table of kw_mm/ops/path_table.py. On a CPU the usual
rules are measured ones already; a file replaces them.
"""
from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from kw_mm.files import write_json
from kw_mm.ops import convolution_paths
from kw_mm.ops.path_table import KINDS, LAYOUTS, Case, Rule, Table, describe_table

from .machine import describe
from .setting import Setting
from .timing import time_in_turns

# Height and width of maps.
LARGE = ((200, 336), (100, 168), (50, 84), (25, 42))
SMALL = ((56, 56), (28, 28), (14, 14), (7, 7))
BATCHES = (1, 2, 4, 8, 16, 128)
# Of the first stage of maps; each stage has twice as many as the one before.
CHANNELS = {'pointwise': 256, 'dense': 64, 'grouped': 96}
# Numbers of a map at most, all samples together: in half precision a gigabyte.
MOST_NUMBERS = 2**29
# Of two ways, the second is taken only if it needs at most this part of the first one's time.
GAIN = 0.97
TIMING: dict[str, Any] = dict(num_rounds=3, num_warmups=2, min_seconds=0.003)


class Shape(NamedTuple):
    """What is convolved."""

    kind: str
    batch: int
    channels: int
    size: tuple[int, int]

    @property
    def positions(self) -> int:
        """Of the map, and of the output."""
        return math.prod(self.size)


class Measurement(NamedTuple):
    """Milliseconds of every way."""

    case: Case
    channels: int
    milliseconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """The fastest way; of nearly equal ones that which comes first in ``KINDS``."""
        best = min(self.milliseconds.values())
        return next(path for path in KINDS[self.case.kernel]
                    if self.milliseconds.get(path, math.inf) * GAIN <= best)


def find_shapes(batches: Sequence[int], kinds: Sequence[str]) -> list[Shape]:
    """Those that are measured. Many large images are left out."""
    found = [Shape(kind, batch, CHANNELS[kind] * 2**stage, size) for kind in kinds
             for batch in batches for sizes in (LARGE, SMALL) for stage, size in enumerate(sizes)]
    return [s for s in found if s.batch * s.channels * s.positions <= MOST_NUMBERS
            and (s.batch <= 16 or s.size in SMALL)]


def measure(shape: Shape, setting: Setting, training: bool, **timing: Any) -> Measurement:
    """Times every way that takes such tensors; training is both passes."""
    kind, batch, channels, size = shape
    out_channels = channels // 4 if kind == 'pointwise' else channels
    groups = channels if kind == 'grouped' else 1
    k = {'pointwise': 1, 'dense': 3, 'grouped': 7}[kind]
    factory: Any = dict(device=setting.device, dtype=setting.dtype)
    x = torch.randn(batch, channels, *size, **factory)
    kernel = torch.randn(batch, out_channels, channels // groups, k, k, **factory)
    if setting.channels_last:
        # As maps and assembled kernels lie in memory then.
        x, kernel = (t.movedim(d, -1).contiguous().movedim(-1, d) for t, d in ((x, 1), (kernel, 2)))
    leaves = [t.requires_grad_(training) for t in (x, kernel)]
    case = Case(kind, batch, shape.positions, LAYOUTS[setting.channels_last], training)

    def program(path: str) -> dict[str, Any]:
        function = getattr(convolution_paths, path if batch > 1 or path not in (
            'sample_by_sample', 'grouped') else 'one')

        def run(_: Any) -> Any:
            y = function(x, kernel, None, setting.channels_last, (1, 1), (k // 2, k // 2), (1, 1),
                         groups)
            y = convolution_paths.in_order(y, setting.channels_last)
            return torch.autograd.grad(y, leaves, y.detach()) if training else y

        return dict(whole=run)

    # Of one sample, a grouped convolution is the same as one by itself.
    names = [path for path in KINDS[kind] if batch > 1 or path != 'grouped']
    with torch.set_grad_enabled(training):
        times = time_in_turns({name: program(name) for name in names}, setting.device,
                              **{**TIMING, **timing})
    return Measurement(case, channels, {name: t.median() * 1e3 for name, t in times.items()})


def make_rules(measurements: Sequence[Measurement]) -> list[Rule]:
    """Rules that choose the fastest way of all measured cases, and of others the nearest's."""
    rules: list[Rule] = []
    for kind in KINDS:
        for layout, training in itertools.product(LAYOUTS, (False, True)):
            some = [m for m in measurements if (m.case.kernel, m.case.layout, m.case.training) == (
                kind, layout, training)]
            rules += _rules_of(some, kind, layout, training)
        # For cases that were not measured, as maps of other dimensions than two.
        rules.append(Rule(kind, KINDS[kind][0]))
    return rules


def _rules_of(measurements: Sequence[Measurement], kind: str, layout: str,
              training: bool) -> Iterator[Rule]:
    by_batch = {m.case.batch: [n for n in measurements if n.case.batch == m.case.batch]
                for m in sorted(measurements, key=lambda m: m.case.batch)}
    chosen: dict[int, list[tuple[str, int | None]]] = {}
    for batch, some in by_batch.items():
        best = {m.case.positions: m.fastest for m in sorted(some, key=lambda m: m.case.positions)}
        chosen[batch] = _merge(list(best.values()), _bounds(list(best)))
    # Batches that choose alike are one.
    for (_, choices), batch in _grouped_batches(chosen):
        for path, positions in choices:
            yield Rule(kind, path, batch, positions, layout, training)


def _grouped_batches(chosen: dict[int, list]) -> list[tuple[tuple[int, list], int | None]]:
    batches = list(chosen)
    bounds = _bounds(batches)
    return [((batch, chosen[batch]), bound) for i, (batch, bound) in enumerate(zip(batches, bounds))
            if i + 1 == len(batches) or chosen[batches[i + 1]] != chosen[batch]]


def _merge(paths: Sequence[str], bounds: Sequence[int | None]) -> list[tuple[str, int | None]]:
    return [(path, bound) for i, (path, bound) in enumerate(zip(paths, bounds))
            if i + 1 == len(paths) or paths[i + 1] != path]


def _bounds(values: Sequence[int]) -> list[int | None]:
    """The largest values that are nearer, as a ratio, to one than to the next; then None."""
    return [*(math.isqrt(a * b) for a, b in itertools.pairwise(values)), None][:len(values)]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='python tools/benchmark tune', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu',
                        help='default: cuda if there is one, else cpu')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE',
                        help='the table, as JSON')
    parser.add_argument('--dtype', choices=['float32', 'bfloat16', 'float16'],
                        help='default: bfloat16 on a GPU, float32 on a CPU')
    parser.add_argument('--batches', type=int, nargs='+', metavar='N',
                        help=f'default: {" ".join(map(str, BATCHES))}, on a CPU 1 2 8')
    parser.add_argument('--kinds', choices=list(KINDS), nargs='+', default=list(KINDS),
                        metavar='KIND', help=f'of {", ".join(KINDS)}; the others keep the first '
                                             'way that takes all of them')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    on_cuda = torch.device(args.device).type == 'cuda'
    if on_cuda and not torch.cuda.is_available():
        parser.error('--device cuda needs a CUDA device, and torch finds none')
    batches = sorted(set(args.batches or (BATCHES if on_cuda else (1, 2, 8))))
    if batches[0] < 1:
        parser.error(f'--batches must be positive, got {batches[0]}')
    dtype = getattr(torch, args.dtype or ('bfloat16' if on_cuda else 'float32'))
    torch.backends.cudnn.benchmark = True
    measurements = []
    for shape in find_shapes(batches, args.kinds):
        for layout, training in itertools.product((False, True), (False, True)):
            setting = Setting(args.device, dtype, channels_last=layout)
            found = measure(shape, setting, training)
            measurements.append(found)
            times = ', '.join(f'{path} {ms:.3g}' for path, ms in found.milliseconds.items())
            print(f'{shape.kind} {shape.batch}x{shape.channels}x{shape.size[0]}x{shape.size[1]} '
                  f'{found.case.layout}{", training" if training else ""}: {times} ms', flush=True)
    facts = describe()
    source = (f'measured: {facts["gpu" if on_cuda else "cpu"]}, {setting.dtype_name}, '
              f'torch {torch.__version__}')
    table = Table(torch.device(args.device).type, source, tuple(make_rules(measurements)))
    write_json(args.out, dict(
        describe_table(table), machine=facts, measured=[
            dict(m.case._asdict(), channels=m.channels, milliseconds=m.milliseconds)
            for m in measurements]), indent=1)
    print(f'{args.out}: {len(table.rules)} rules of {len(measurements)} measurements')
    return 0


if __name__ == '__main__':
    sys.exit(main())
