"""A peer that is a server: a process of its own that listens on a loopback port."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.benchmarks.dialects import Dialect
from tests.benchmarks.load import ask_all
from tests.benchmarks.results import Run
from tests.benchmarks.workload import Prompted, Workload

WAIT_S = 300.0
STOP_WITHIN_S = 20.0
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
        _wait(url, process, log)
        yield url, process, time.monotonic() - began
    finally:
        _stop(process)


def free_port() -> int:
    """A loopback port that nobody has just now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def run_once(command: list[str], log: Path) -> None:
    """Run a tool to its end. Raises `PeerError` with the end of its log."""
    with log.open("ab") as out:
        done = subprocess.run(command, stdout=out, stderr=out, check=False, timeout=WAIT_S)
    if done.returncode:
        raise PeerError(f"{Path(command[0]).name} ended with {done.returncode}; its log ends:\n{_end(log)}")


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + WAIT_S
    while time.monotonic() < until and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    state = "still starts" if process.returncode is None else f"ended with {process.returncode}"
    raise PeerError(f"the server {state}; its log ends:\n{_end(log)}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_WITHIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _end(log: Path) -> str:
    return log.read_text(errors="replace")[-2000:]
