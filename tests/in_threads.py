"""Runs a function in several threads at the same time."""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def run_in_threads(function: Callable[[int], Any], num_threads: int = 2) -> list[Any]:
    """Results of ``function(thread)``; all threads start at the same time."""
    results: list[Any] = [None] * num_threads
    barrier = threading.Barrier(num_threads)

    def work(i: int) -> None:
        barrier.wait()
        results[i] = function(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
