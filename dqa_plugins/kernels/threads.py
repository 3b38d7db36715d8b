"""Kernels in threads: Python threads around functions that release the GIL, not OpenMP.

torch's own pool, whose idle threads spin for a while after each operation, is neither used nor resized.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Lock
from typing import Any

import torch

PARTS = 4  # ranges for each thread: a thread that is slow gets fewer of them
_CORES = os.cpu_count() or 1  # asked once: it reads a file
_lock = Lock()
_pool: ThreadPoolExecutor | None = None
started = False  # whether there may be threads that a forked child lacks: here, or torch's behind a lowered model


def _after_fork() -> None:
    """A forked child inherits the pool, and perhaps a held lock, but none of the threads that would serve them.

    Neither those of torch: with GNU OpenMP (torch 2.13 on Linux) its first large operation would wait for them forever.
    So it gets one thread there, as torch's DataLoader does for its workers.
    """
    global _pool, _lock
    if started:
        torch.set_num_threads(1)
    _pool, _lock = None, Lock()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_after_fork)


def torch_threads() -> int:
    """torch's own setting, within the cores that there are."""
    return max(1, min(torch.get_num_threads(), _CORES))


def share(task: Callable[[int], Any], count: int, threads: int) -> list[Any]:
    """task(0) to task(count - 1), each done by whichever thread is free; the results in order."""
    if threads == 1 or count <= 1:
        return [task(i) for i in range(count)]
    global _pool, started
    started = True
    with _lock:
        if _pool is None or _pool._max_workers < threads - 1:
            _pool = ThreadPoolExecutor(threads - 1, thread_name_prefix="dqa-kernels")
        pool = _pool
    results: list[Any] = [None] * count
    numbers = itertools.count()

    def work() -> None:
        while (i := next(numbers)) < count:
            results[i] = task(i)

    futures = [pool.submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:  # nobody may still write when the caller goes on
        wait(futures)
    for future in futures:
        future.result()
    return results
