"""The threads that load adapters, each with one core."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch

NICENESS = 10


def give_way() -> None:
    """From now on the calling thread computes at low priority."""
    with contextlib.suppress(OSError):  # of this thread alone, on Linux
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(NICENESS, os.nice(0)))


class LoaderThreads(Executor):
    """Threads that run torch's operators alone, each job in the first that is free; the caller's stay as they are.

    They are daemons: an engine that ends waits for no load. `submit` is called between two steps. So it takes no lock
    but the queue's own, and makes no future: a thread without a core that holds such a lock would hold up the step.
    """

    def __init__(self, num_threads: int) -> None:
        self._jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
        # `torch.set_num_threads` sets the calling thread's own count, once that thread has asked for it, and what
        # threads that have not asked yet will take: so each sets its own, and then the caller sets back the others'.
        before = torch.get_num_threads()
        are_ready = threading.Barrier(num_threads + 1)
        for number in range(num_threads):
            threading.Thread(target=self._run, args=(are_ready,), name=f"loader_{number}", daemon=True).start()
        are_ready.wait()
        torch.set_num_threads(before)

    def submit(self, fn: Callable[..., object], /, *args: Any, **kwargs: Any) -> Any:
        """Run `fn`, which must not raise, when a thread is free; nothing tells what it returned."""
        self._jobs.put(partial(fn, *args, **kwargs))

    def _run(self, are_ready: threading.Barrier) -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        are_ready.wait()
        while True:
            self._jobs.get()()
