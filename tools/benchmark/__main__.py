"""Measures KernelWarehouse: ``python tools/benchmark COMMAND ...``, with ``--help`` for each."""
from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

# Each command is the ``main(argv)`` of a module.
COMMANDS = {
    'gpu': ('kw_benchmark.gpu', 'all checks and figures on a GPU, within minutes'),
    'speed': ('kw_benchmark.speed', 'KW networks beside their static twins: time, memory, floors'),
    'tune': ('kw_benchmark.tune', 'which way to convolve each sample is fastest on this machine'),
}


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        names = '\n'.join(f'  {name:<10}{text}' for name, (_, text) in COMMANDS.items())
        print(f'usage: python tools/benchmark COMMAND ...\n\n{names}',
              file=sys.stdout if argv and argv[0] in ('-h', '--help') else sys.stderr)
        return 0 if argv and argv[0] in ('-h', '--help') else 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:])


if __name__ == '__main__':
    sys.exit(main())
