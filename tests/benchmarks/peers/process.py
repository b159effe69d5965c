"""A peer that is a server: a process of its own that listens on a loopback port."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.benchmarks.dialects import Dialect
from tests.benchmarks.load import ask_all
from tests.benchmarks.results import Run
from tests.benchmarks.workload import Prompted, Workload
from tests.kit.server import stop, tail, wait_for

WAIT_S = 300.0
MIB = 2**20


class PeerError(Exception):
    """A peer did not start, or ended early; its log says why."""


@dataclass
class ServerSession:
    """A server that is up, asked in its dialect. It is warm after the first request of each kind."""

    name: str
    url: str
    process: subprocess.Popen[bytes]
    dialect: Dialect
    facts: dict[str, float] = field(default_factory=dict)

    def run(self, workload: Workload, requests: list[Prompted], on_done: Callable[[], None]) -> Run:
        """See `peers.Session.run`."""
        first = [Prompted(requests[0].adapter, [1, 2, 3], 2)]
        ask_all(self.url, first, 1, str, lambda: None, self.dialect)  # to warm up
        seconds, timings = ask_all(self.url, requests, workload.concurrency, str, on_done, self.dialect)
        return Run(self.name, workload.name, seconds, timings, self._memory() / MIB)

    def _memory(self) -> int:
        parent = psutil.Process(self.process.pid)
        processes = [parent, *parent.children(recursive=True)]
        return sum(process.memory_full_info().pss for process in processes)


@contextmanager
def running(
    command: list[str], log: Path, port: int, environment: dict[str, str]
) -> Iterator[tuple[str, subprocess.Popen[bytes], float]]:
    """Run a server until the way out -> (its URL, the process, seconds until `/health` answered 200).

    Raises `PeerError` with the end of the log where it does not come up.
    """
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=os.environ | environment)
    try:
        _wait(url, process, log, began + WAIT_S)
        yield url, process, time.monotonic() - began
    finally:
        stop(process)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path, until: float) -> None:
    try:
        wait_for(f"{url}/health", process, log, until)
    except RuntimeError as error:
        raise PeerError(str(error)) from None


def run_once(command: list[str], log: Path) -> None:
    """Run a tool to its end. Raises `PeerError` with the end of its log."""
    with log.open("ab") as out:
        done = subprocess.run(command, stdout=out, stderr=out, check=False, timeout=WAIT_S)
    if done.returncode:
        raise PeerError(f"{Path(command[0]).name} ended with {done.returncode}; its log ends:\n{tail(log)}")
