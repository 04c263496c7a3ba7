"""Runs a function in several threads at the same time."""
from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def run_in_threads(function: Callable[[int], Any], num_threads: int = 2) -> list[Any]:
    """Results of ``function(thread)``; all threads start at the same time, errors are raised."""
    barrier = threading.Barrier(num_threads)

    def work(i: int) -> Any:
        barrier.wait()
        return function(i)

    with ThreadPoolExecutor(num_threads) as pool:
        return list(pool.map(work, range(num_threads)))
