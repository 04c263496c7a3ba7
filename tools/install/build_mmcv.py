"""Installs mmcv with its compiled operators, and shows the compiler's progress.

    python tools/install/build_mmcv.py --constraint requirements.txt
    python tools/install/build_mmcv.py --fork    # onedl-mmcv, the maintained fork

mmcv has no wheels for current versions of torch, so pip compiles its C++ files against the
installed torch; torch, setuptools, wheel, ninja and psutil must be installed before. pip caches the
wheel, so a second environment gets it in seconds.

GCC compiles for the CPU through precompiled.py beside this file, in a fraction of the time; other
compilers, and GCC beside nvcc, as pip calls them. All are told of the C++ that torch's headers ask
for: since torch 2.14 that is more than mmcv knows of.
"""
from __future__ import annotations

import argparse
import importlib.util
import os
import queue
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# It lies beside this file, where Python looks for modules of a script.
from check_env import NMS_ON_CPU, load_supported, read_pins, run_python

PRECOMPILED = Path(__file__).resolve().with_name('precompiled.py')

# Compiling the CPU operators took 6.5 to 16.5 minutes on two cores, on three machines; with the
# headers precompiled a quarter of the processors' time (docs/versions.md); with CUDA, 31 minutes.
CORE_SECONDS_PRECOMPILED = 2 * 2 * 60
CORE_SECONDS_CPU = 2 * 12 * 60
CORE_SECONDS_CUDA = 2 * 31 * 60

SECONDS_BETWEEN_LINES = 20

# Patterns in the log of a failed build, and what would mend it; the most specific come first.
HINTS = (
    (r'Python\.h: No such file', 'install the headers of Python (Debian, Ubuntu: apt-get install '
                                 'python3-dev)'),
    (r'fatal error: Killed signal|[Cc]annot allocate memory|virtual memory exhausted',
     'memory ran out: compile fewer files at a time, MAX_JOBS=1 make env'),
    (r'CUDA_HOME|nvcc.*not found', 'install the CUDA toolkit that torch.version.cuda tells, or '
                                   'build for the CPU only: CUDA_VISIBLE_DEVICES= make env'),
    (r'cusparse\.h: No such file', 'the headers of the CUDA libraries are missing: install them, '
                                   'or point CPATH at the include folder of the nvidia packages '
                                   'that torch installed'),
    (r"No module named 'pkg_resources'", 'install "setuptools<82" first'),
    (r'(c\+\+|g\+\+|gcc): (command )?not found|No such file or directory: \'(c\+\+|g\+\+|gcc)\'|'
     r'command \S*(c\+\+|g\+\+|gcc)\S* failed: No such file',
     'install a C++ compiler (Debian, Ubuntu: apt-get install g++)'),
    (r'No matching distribution found|Could not find a version', 'pip finds no mmcv of this '
                                                                 'version: check its settings and '
                                                                 'the network'),
)


def hint(log: str) -> str | None:
    """Returns what would mend a failed build, if its log tells."""
    return next((advice for pattern, advice in HINTS if re.search(pattern, log)), None)


def minutes(seconds: float) -> str:
    """Returns a duration as text, e.g. ``'6 min 05 s'``."""
    whole = max(0, round(seconds))
    return f'{whole // 60} min {whole % 60:02d} s' if whole >= 60 else f'{whole} s'


class Progress:
    """Reads the lines of a build and tells its progress.

    Args:
        jobs: Files compiled at the same time.
        core_seconds: A guess how long one core would compile.
        now: The time at which the build started, in seconds.
    """

    def __init__(self, jobs: int, core_seconds: float, now: float) -> None:
        self.guess = core_seconds / jobs
        self.started = now
        self.compiling_since: float | None = None
        self.done = self.total = 0

    def read(self, line: str, now: float) -> None:
        """Takes one line of pip's output; ninja's begin with e.g. ``[12/78]``."""
        match = re.match(r'\s*\[(\d+)/(\d+)\]', line)
        if match:
            self.done, self.total = int(match[1]), int(match[2])
        # ninja writes a line only when a file is done; setuptools says when compilation starts.
        if self.compiling_since is None and (match or 'running build_ext' in line):
            self.compiling_since = now

    def line(self, now: float) -> str:
        """Returns e.g. ``'mmcv: 12 of 78 files compiled, 1 min 10 s, about 6 min 25 s to go'``."""
        elapsed = now - self.started
        if self.compiling_since is None:
            return f'mmcv: pip is getting ready, {minutes(elapsed)}'
        spent = now - self.compiling_since
        left = self.guess - spent
        if self.total:
            # The guess has the weight of a tenth of the files, because the first files alone say
            # little.
            left = ((self.total - self.done) * (spent + self.guess / 10)
                    / (self.done + self.total / 10))
        files = f'{self.done} of {self.total or "?"} files compiled'
        to_go = f'about {minutes(left)} to go' if left > 0 else 'longer than usual'
        return f'mmcv: {files}, {minutes(elapsed)}, {to_go}'


def run_with_progress(command: list[str], env: dict[str, str], log: Path,
                      progress: Progress) -> int:
    """Runs a command with its output in a log and progress on the terminal. Returns its status."""
    lines: queue.Queue[str | None] = queue.Queue()
    shown = progress.started
    on_terminal = sys.stdout.isatty()
    with log.open('w', encoding='utf-8', errors='replace') as file, subprocess.Popen(
            command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors='replace') as process:

        def read() -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        # In a thread, because one file takes half a minute and the time should be updated
        # meanwhile.
        threading.Thread(target=read, daemon=True).start()
        try:
            while True:
                now = time.monotonic()
                if on_terminal and now - shown >= 1:
                    print(f'\r{progress.line(now):<78}', end='', flush=True)
                    shown = now
                elif not on_terminal and now - shown >= SECONDS_BETWEEN_LINES:
                    print(progress.line(now), flush=True)
                    shown = now
                try:
                    line = lines.get(timeout=1)
                except queue.Empty:
                    continue
                if line is None:
                    break
                file.write(line)
                file.flush()
                progress.read(line, time.monotonic())
        # However this process ends, no compiler may go on running.
        except BaseException:
            process.terminate()
            raise
    if on_terminal and shown != progress.started:
        print()
    return process.returncode


def gpu_support() -> tuple[bool, bool]:
    """Whether torch sees a GPU, and whether there is a CUDA compiler."""
    done = subprocess.run(
        [sys.executable, '-c', 'import torch\nfrom torch.utils.cpp_extension import CUDA_HOME\n'
                               'print(torch.cuda.is_available(), CUDA_HOME is not None)'],
        capture_output=True, text=True)
    answer = done.stdout.split()[-2:]
    return answer[:1] == ['True'], answer[1:] == ['True']


def standard_option(torch: Path | None = None) -> list[str]:
    """Returns the compiler's option for the C++ that torch's headers ask for.

    Args:
        torch: The folder of the package; by default that which would be imported.

    Returns:
        Nothing where mmcv's own will do: it asks for C++17, and torch since 2.14 for C++20.
    """
    if torch is None:
        spec = importlib.util.find_spec('torch')
        torch = Path(spec.origin).parent if spec and spec.origin else Path()
    header = torch / 'include' / 'ATen' / 'ATen.h'
    text = header.read_text(encoding='utf-8') if header.is_file() else ''
    standard = re.search(r'#error C\+\+(\d\d) or later', text)
    return [f'-std=c++{standard[1]}'] if standard and int(standard[1]) > 17 else []


def version_of(compiler: list[str]) -> str | None:
    """Returns what a compiler says about itself, None if it does not run."""
    try:
        done = subprocess.run([*compiler, '--version'], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout if done.returncode == 0 else None


def wrap_compiler(folder: Path, options: list[str], sooner: bool) -> Path | None:
    """Writes a command that compiles as torch's default compiler does.

    Args:
        folder: An empty folder, for the command and what it leaves.
        options: Further ones, which hold against those that are given.
        sooner: Whether to read headers once for all files, which only GCC can.

    Returns:
        The command, or None if the compiler is not GCC but should be, or nothing runs in the
        folder.
    """
    command = shlex.split(os.environ.get('CXX') or 'c++')
    if sooner:
        command = [sys.executable, str(PRECOMPILED), str(folder), *command]
    script = folder / 'c++'
    # Of two standards the compiler takes the last.
    script.write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@" {shlex.join(options)}\n',
                      encoding='utf-8')
    script.chmod(0o700)
    version = version_of([str(script)])
    is_right = version is not None and (not sooner or 'Free Software Foundation' in version)
    return script if is_right else None


def build_environment(folder: Path) -> tuple[dict[str, str], float]:
    """Returns environment variables for the build and how long one core would compile.

    Args:
        folder: An empty folder that must exist during the build.
    """
    env = dict(os.environ, MMCV_WITH_OPS='1', PYTHONUNBUFFERED='1')
    if not env.get('MAX_JOBS'):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        env['MAX_JOBS'] = str(cores or 1)
    gpu, compiler = gpu_support()
    with_cuda = env.get('FORCE_CUDA') == '1' or (gpu and compiler)
    if gpu and not with_cuda:
        print('warning: torch sees a GPU, but there is no CUDA compiler (nvcc): mmcv is built for '
              'the CPU only.\n  For its operators on the GPU, install the CUDA toolkit of the '
              'version torch.version.cuda tells,\n  then type: '
              f'{sys.executable} {__file__} --again', flush=True)
        # mmcv compiles CUDA files whenever torch sees a GPU.
        env['CUDA_VISIBLE_DEVICES'] = ''
    options = standard_option()
    if with_cuda and options:
        env['NVCC_APPEND_FLAGS'] = ' '.join([env.get('NVCC_APPEND_FLAGS', ''), *options]).strip()
    wrapper = None if with_cuda else wrap_compiler(folder, options, sooner=True)
    seconds = (CORE_SECONDS_CUDA if with_cuda else CORE_SECONDS_CPU if wrapper is None
               else CORE_SECONDS_PRECOMPILED)
    if wrapper is None and options:
        wrapper = wrap_compiler(folder, options, sooner=False)
    return env if wrapper is None else dict(env, CXX=str(wrapper)), seconds


def install(name: str, versions: str, constraint: Path | None, log: Path, again: bool) -> bool:
    """Runs pip.

    Args:
        name: What to install, ``'mmcv'`` or its fork.
        versions: Which, e.g. ``'==2.1.0'``.
        constraint: Constraints file for pip.
        log: File for the output of pip and the compiler.
        again: Compile even if mmcv is installed or a wheel is cached.

    Returns:
        Whether something was compiled (otherwise pip had a wheel, or nothing to do).

    Raises:
        SystemExit: If pip fails; the end of the log has been printed.
    """
    requirement = name + versions
    command = [sys.executable, '-m', 'pip', 'install', '-v', '--disable-pip-version-check',
               '--no-build-isolation', requirement]
    if constraint is not None:
        command += ['-c', str(constraint)]
    if again:
        command += ['--no-cache-dir', '--no-binary', name, '--force-reinstall', '--no-deps']
    with tempfile.TemporaryDirectory(prefix='mmcv-') as folder:
        env, core_seconds = build_environment(Path(folder))
        jobs = max(1, int(env['MAX_JOBS']))
        print(f'Installing {requirement}. Unless pip has a wheel of it in its cache, this compiles '
              f'C++ for\nabout {minutes(core_seconds / 2)} on two cores; here {jobs} '
              f'{"file" if jobs == 1 else "files"} at a time (MAX_JOBS). Log: {log}', flush=True)
        progress = Progress(jobs, core_seconds, time.monotonic())
        status = run_with_progress(command, env, log, progress)
    spent = minutes(time.monotonic() - progress.started)
    if status != 0:
        text = log.read_text(encoding='utf-8', errors='replace')
        advice = hint(text)
        print('\n'.join(text.splitlines()[-40:]), file=sys.stderr)
        sys.exit(f'error: installing {requirement} failed after {spent}; the end of its log is '
                 f'above, all of it in {log}\n'
                 + (f'  what to do: {advice}' if advice else '  what to do: read the log'))
    print(f'{requirement} compiled and installed in {spent}.' if progress.total else
          f'{requirement} installed in {spent} from a wheel, nothing to compile.', flush=True)
    return progress.total > 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description='Install mmcv with its compiled operators.')
    parser.add_argument('-c', '--constraint', type=Path, metavar='FILE',
                        help='requirements file with the versions to install')
    parser.add_argument('--fork', action='store_true',
                        help='install onedl-mmcv, as is done where packages of the fork are')
    parser.add_argument('--again', action='store_true', help='compile even if mmcv is there')
    args = parser.parse_args(argv)

    names = load_supported()
    found = {name: names['installed_version'](name) for name in names['SUPPORTED']}
    mmcv = names['FORKS']['mmcv'] if args.fork else names['distribution']('mmcv', found)
    pin = read_pins(args.constraint).get(mmcv) if args.constraint else None
    versions = f'=={pin}' if pin else names['SUPPORTED'][mmcv]
    prefix = Path(sys.prefix)
    log = prefix / 'mmcv-build.log'
    # Records for which torch the operators were compiled, which neither the wheel nor pip knows.
    mark = prefix / 'mmcv-built-for.txt'
    torch = found['torch']
    if torch is None:
        sys.exit('error: torch is not installed, and mmcv is compiled against it\n'
                 f'  what to do: {sys.executable} -m pip install torch')

    again = args.again or (mark.exists() and mark.read_text(encoding='utf-8') != torch)
    there = found[mmcv]
    if there is not None and not again and (pin is None or there == pin):
        if run_python(NMS_ON_CPU) is None:
            print(f'{mmcv} {there} is installed and its operators work.')
            mark.write_text(torch, encoding='utf-8')
            return 0
        again = True

    compiled = install(mmcv, versions, args.constraint, log, again)
    failure = run_python(NMS_ON_CPU)
    if failure is not None and not compiled:
        print(f'The wheel does not fit torch {torch} ({failure}): compiling one that does.')
        install(mmcv, versions, args.constraint, log, again=True)
        failure = run_python(NMS_ON_CPU)
    if failure is not None:
        sys.exit(f'error: mmcv is installed, but its operators do not work: {failure}\n'
                 f'  what to do: read {log}')
    mark.write_text(torch, encoding='utf-8')
    return 0


if __name__ == '__main__':
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit('\nmmcv: interrupted; the same command starts compiling anew')
