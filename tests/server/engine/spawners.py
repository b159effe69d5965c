"""Spawners of tests, in which an engine's loads run."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor


class LateSpawner:
    """Runs a job when told to."""

    def __init__(self) -> None:
        self.jobs: deque[Callable[[], None]] = deque()

    def spawn(self, fn: Callable[[], None]) -> None:
        """Queue the job until it is run."""
        self.jobs.append(fn)

    def run_one(self) -> None:
        """Run the oldest job."""
        self.jobs.popleft()()

    def run_all(self) -> None:
        """Run what is queued."""
        while self.jobs:
            self.run_one()


class ThreadSpawner(ThreadPoolExecutor):
    """Runs jobs in threads; leaving it waits for them."""

    def spawn(self, fn: Callable[[], None]) -> None:
        """Run the job in the first thread that is free."""
        self.submit(fn)
