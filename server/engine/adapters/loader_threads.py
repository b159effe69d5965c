"""The threads in which adapters are loaded, each of one core."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

import torch

NICENESS = 10


def give_way() -> None:
    """Lower the calling thread's priority from now on, so that steps get the cores first."""
    with contextlib.suppress(OSError):  # of this thread alone, on Linux
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(NICENESS, os.nice(0)))


class LoaderThreads:
    """A `Spawner` of `num_threads` threads whose torch operators use one core; other threads' counts stay as they are.

    They are daemons: an engine that ends waits for no load. `spawn` is called between two steps. So it takes no lock
    but the queue's own and makes no future: a thread without a core that held such a lock would hold up the step.
    """

    def __init__(self, num_threads: int) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # `torch.set_num_threads` sets the calling thread's own count, once that thread has asked for it, and what
        # threads that have not asked yet will take: so each sets its own, and then the caller sets back the others'.
        before = torch.get_num_threads()
        are_ready = threading.Barrier(num_threads + 1)
        for number in range(num_threads):
            threading.Thread(target=self._run, args=(are_ready,), name=f"loader_{number}", daemon=True).start()
        are_ready.wait()
        torch.set_num_threads(before)

    def spawn(self, fn: Callable[[], None]) -> None:
        """Run a function, which must not raise, in the first thread that is free."""
        self._jobs.put(fn)

    def _run(self, are_ready: threading.Barrier) -> None:
        torch.get_num_threads()
        torch.set_num_threads(1)
        are_ready.wait()
        while True:
            self._jobs.get()()
