"""Compiles a file of mmcv with GCC, in a tenth of the time.

    python tools/install/precompiled.py FOLDER c++ -I ... -c nms.cpp -o nms.o

GCC spends most of its time on two things. It reads the two headers that all files of mmcv include,
and through them torch: here they are read once and kept in FOLDER as a precompiled header. And it
writes debug information, because Python was built with ``-g``: here it does not. The machine code
stays the same.

Whatever goes wrong with that, the command is run as it was given.
"""
from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

HEADERS = '#include "pytorch_cpp_helper.hpp"\n#include "pytorch_device_registry.hpp"\n'


def source_of(command: list[str]) -> str | None:
    """Returns the file of mmcv that a command compiles, None if the command does something else."""
    sources = [word for word in command if word.endswith('.cpp') and 'csrc' in Path(word).parts]
    return sources[0] if '-c' in command and len(sources) == 1 else None


def without_files(command: list[str], source: str) -> list[str]:
    """Returns the compiler and its flags, without the files that it reads and writes."""
    kept = []
    words = iter(command)
    for word in words:
        if word in ('-o', '-MF', '-MT', '-MQ'):
            next(words, None)
        elif word not in ('-c', '-MMD', '-MD', source):
            kept.append(word)
    return kept


def precompiled(command: list[str], source: str, folder: Path) -> Path | None:
    """Returns the header that GCC has precompiled, None if it could not.

    The first command makes it, with its own flags, because GCC takes a precompiled header only
    for the flags that it was made with. Commands that run at the same time wait for it.
    """
    header = folder / 'headers.hpp'
    made = folder / 'headers.hpp.gch'
    with open(folder / 'lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The header is written first, so that it alone tells of a compilation that failed.
        if not header.exists():
            header.write_text(HEADERS)
            unfinished = folder / 'unfinished'
            done = subprocess.run([*without_files(command, source), '-x', 'c++-header', header,
                                   '-o', unfinished])
            if done.returncode == 0:
                unfinished.rename(made)
            else:
                unfinished.unlink(missing_ok=True)
    return header if made.exists() else None


def compile_sooner(command: list[str], source: str, folder: Path) -> bool:
    """Compiles a file with the precompiled header. Returns whether that went well."""
    command = [*command, '-g0']
    try:
        header = precompiled(command, source, folder)
        return header is not None and subprocess.run(
            [*command, '-Winvalid-pch', '-include', header]).returncode == 0
    # The disk is full, or the folder cannot be written.
    except OSError as error:
        print(f'{source}: {error}', flush=True)
        return False


def main(argv: list[str]) -> int:
    folder, command = Path(argv[0]), argv[1:]
    source = source_of(command)
    if source is not None:
        if compile_sooner(command, source, folder):
            return 0
        print(f'{source}: no precompiled headers, now as usual', flush=True)
    return subprocess.run(command).returncode


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
