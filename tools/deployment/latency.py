"""Times exported files side by side on the CPU, in turns, so that all see the same machine.

    python tools/deployment/latency.py kw.onnx static.onnx --sizes 224x224 800x1344

Prints the median of each file at each size, and its ratio to the last file's.
"""
from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import numpy as np

from kw_mm.engine.launch import image_size
from kw_mm.export import ModelFile
from kw_mm.export.files import RUNTIMES
from kw_mm.table import format_table


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('files', nargs='+', metavar='FILE', help='as export.py writes them')
    parser.add_argument('--sizes', nargs='+', type=image_size, default=[(224, 224), (800, 1344)],
                        metavar='HxW',
                        help='of images (default: 224x224 800x1344)')
    parser.add_argument('--batch', type=int, default=1, help='images at a time (default: 1)')
    parser.add_argument('--rounds', type=int, default=10, help='default: %(default)s')
    parser.add_argument('--threads', type=int, help="default: the runtime's choice")
    parser.add_argument('--runtime', choices=sorted({name for names in RUNTIMES.values()
                                                     for name in names}),
                        help="default: what each file's ending asks for; OpenVINO reads .onnx too")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        runs = [ModelFile(path, args.threads, args.runtime) for path in args.files]
    except (ImportError, OSError, ValueError) as error:
        parser.error(str(error))
    rows = []
    for height, width in args.sizes:
        x = np.random.default_rng(0).normal(size=(args.batch, 3, height, width))
        inputs = [x.astype(np.float32)]
        if len(runs[0].metadata.get('inputs', ['images'])) == 2:
            inputs.append(np.tile(np.float32([height, width]), (args.batch, 1)))
        for run in runs:
            run(*inputs)
        times: list[list[float]] = [[] for _ in runs]
        for _ in range(args.rounds):
            for run, own in zip(runs, times):
                start = time.perf_counter()
                run(*inputs)
                own.append(time.perf_counter() - start)
        medians = [statistics.median(own) for own in times]
        rows += [(f'{args.batch}x{height}x{width}', path, f'{1000 * median:.1f}',
                  f'{median / medians[-1]:.2f}') for path, median in zip(args.files, medians)]
    print(format_table(('images', 'file', 'ms', 'ratio'), rows, right=(2, 3)))


if __name__ == '__main__':
    main()
