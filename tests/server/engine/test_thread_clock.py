"""The clock by which stalls are told from time in which others had the cores."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from server.engine import thread_clock

needs_turns = pytest.mark.skipif(
    not thread_clock.SCHEDSTAT.exists(), reason="this system does not say when a thread had no core"
)
BUSY = "import os\nos.sched_setaffinity(0, {%d})\nprint(flush=True)\nwhile True: pass"


@contextmanager
def busy(core: int) -> Iterator[None]:
    """A process that wants all of a core."""
    process = subprocess.Popen([sys.executable, "-c", BUSY % core], stdout=subprocess.PIPE)
    try:
        assert process.stdout and process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def run_beside_busy(compute: Callable[[], None]) -> None:
    """Run it in a thread that shares its core with a busy process."""
    core = min(os.sched_getaffinity(0))

    def run() -> None:
        os.sched_setaffinity(0, {core})  # of this thread alone
        compute()

    with busy(core):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()


@needs_turns
def test_it_stands_still_without_a_core() -> None:
    """Beside a busy process on the same core it counts what the thread computes, and not what passes."""
    times: list[float] = []

    def compute() -> None:
        clock = thread_clock.thread_clock()
        began = clock(), time.monotonic(), time.thread_time()
        while time.thread_time() - began[2] < 0.2:
            pass
        times.extend([clock() - began[0], time.monotonic() - began[1]])

    run_beside_busy(compute)
    own, passed = times
    assert own == pytest.approx(0.2, abs=0.02) and passed > 1.4 * own, times


@needs_turns
def test_a_reading_is_of_one_moment() -> None:
    """A thread that loses its core while it reads the clock does not count that: no reading is before the last one."""
    steps: list[float] = []

    def read() -> None:
        clock = thread_clock.thread_clock()
        now, end = clock(), time.monotonic() + 2
        while time.monotonic() < end:
            last, now = now, clock()
            steps.append(now - last)

    run_beside_busy(read)
    assert min(steps) > -1e-6, min(steps)


@needs_turns
def test_it_goes_on_while_the_thread_waits() -> None:
    """Waiting for a lock or a time is the thread's own time."""
    clock = thread_clock.thread_clock()
    assert clock is not time.monotonic
    began = clock()
    threading.Event().wait(0.05)
    assert clock() - began > 0.045


def test_without_the_systems_report_it_is_the_monotonic_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is the monotonic clock if the system reports no delay: a stall is never hidden."""
    monkeypatch.setattr(thread_clock, "SCHEDSTAT", Path("/nowhere"))
    assert thread_clock.thread_clock() is time.monotonic
