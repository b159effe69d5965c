"""A peer in a process of its own, possibly of another environment: a JSON line in, JSON lines out."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LIMIT_S = 900.0  # of one job: a worker that hangs is killed


class WorkerError(Exception):
    """The worker ended before its answer; its log says why."""


class Worker:
    """Talks with one such process: `ask` sends a job and returns its result."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def ask(self, job: dict[str, Any], on_done: Callable[[], None] = lambda: None) -> dict[str, Any]:
        """Send one job; lines `{"done": n}` report progress, the next other one is the result."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        watch = threading.Timer(LIMIT_S, self.process.kill)
        watch.start()
        try:
            return self._result(self.process.stdout, on_done)
        finally:
            watch.cancel()

    def _result(self, lines: Iterable[str], on_done: Callable[[], None]) -> dict[str, Any]:
        for line in lines:
            message: dict[str, Any] = json.loads(line)
            if "done" not in message:
                return message
            for _ in range(message["done"]):
                on_done()
        raise WorkerError(f"the worker ended; its log ends:\n{self.log.read_text(errors='replace')[-2000:]}")


@contextmanager
def worker(command: list[str], log: Path, num_threads: int) -> Iterator[Worker]:
    """Run `command`; closing its standard input ends it."""
    environment = os.environ | {"OMP_NUM_THREADS": str(num_threads), "MKL_NUM_THREADS": str(num_threads)}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        yield Worker(process, log)


def jobs() -> Iterator[dict[str, Any]]:
    """For the worker's own side: the jobs, until there are no more."""
    import sys

    for line in sys.stdin:
        yield json.loads(line)


def say(message: dict[str, Any]) -> None:
    """For the worker's own side: one line to the bench."""
    print(json.dumps(message), flush=True)
