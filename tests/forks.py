"""Runs functions in forks of this process, which spares them the seconds that imports take."""
from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

ROOT = Path(__file__).parents[1]

# Seconds after which a process hangs. On a busy machine a run took more than 300.
PATIENCE = 1800


def load_tool(path: str) -> ModuleType:
    """The module of a tool, by its path below ``tools``."""
    spec = importlib.util.spec_from_file_location(f'{Path(path).stem}_tool', ROOT / 'tools' / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(function: Callable, *args: object, log: Path,
          environment: Mapping[str, str] | None = None) -> BaseProcess:
    """Calls a function in a child, whose output goes to a file."""
    process = multiprocessing.get_context('fork').Process(
        target=_call, args=(function, args, log, environment or {}))
    process.start()
    return process


def start_tool(path: str, *argv: object, log: Path) -> BaseProcess:
    """Calls the ``main`` of a tool in a child, from the top of the project."""
    return start(_call_tool, path, list(map(str, argv)), log=log)


def finish(process: BaseProcess, log: Path, status: int = 0) -> str:
    """Waits for a child, which is to end with a status; returns what it wrote."""
    process.join(PATIENCE)
    output = log.read_text()
    assert process.exitcode == status, (process.exitcode, output)
    return output


def run_ranks(function: Callable, *args: object, num: int, log: Path) -> None:
    """Calls a function in children that are the ranks of ``torch.distributed`` on this machine."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    logs = [log.with_name(f'{log.name}.{rank}') for rank in range(num)]
    processes = [start(function, *args, log=logs[rank], environment=dict(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num), LOCAL_WORLD_SIZE=str(num),
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))) for rank in range(num)]
    for process, each in zip(processes, logs):
        finish(process, each)


def _call_tool(path: str, argv: Sequence[str]) -> None:
    os.chdir(ROOT)
    load_tool(path).main(argv)


def _call(function: Callable, args: Sequence[object], log: Path,
          environment: Mapping[str, str]) -> None:
    torch.set_num_threads(1)  # the others do not survive a fork
    # As in a new process, or a state that nobody restores would not be missed.
    random.seed(), np.random.seed(), torch.seed()
    os.environ.update(environment)
    stream = open(log, 'w', buffering=1)  # noqa: SIM115  (to the end)
    sys.stdout = sys.stderr = stream
    os.dup2(stream.fileno(), 1)
    os.dup2(stream.fileno(), 2)
    function(*args)
