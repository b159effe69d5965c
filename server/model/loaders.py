"""The threads that load adapters, each with one core."""

from __future__ import annotations

import contextlib
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

NICENESS = 10


def give_way() -> None:
    """From now on the calling thread computes at low priority."""
    with contextlib.suppress(OSError):  # of this thread alone, on Linux
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(NICENESS, os.nice(0)))


def make_loaders(num_threads: int) -> ThreadPoolExecutor:
    """An executor whose threads run torch's operators alone; the caller's threads stay as they are.

    `torch.set_num_threads` sets the calling thread's own count, once that thread has asked for it, and what threads
    that have not asked yet will take: so each loader sets its own, and then the caller sets back what is for others.
    """
    before = torch.get_num_threads()
    are_ready = threading.Barrier(num_threads + 1)

    def begin() -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)

    executor = ThreadPoolExecutor(num_threads, "loader", begin)
    for _ in range(num_threads):  # each waits for all, so that each has a thread of its own
        executor.submit(are_ready.wait)
    are_ready.wait()
    torch.set_num_threads(before)
    return executor
