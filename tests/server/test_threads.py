"""Threads that tenants share by turns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from contextvars import Context
from functools import partial
from threading import Event

import pytest

from server.errors import TenantLimitError
from server.threads import OWN, FairThreads, work_for

SOON_S = 20


class Gate:
    """Functions that wait until they are let through; `begun` has the names of those that run or ran, in order."""

    def __init__(self, threads: FairThreads) -> None:
        self._threads, self._open = threads, Event()
        self.begun: list[str] = []

    def submit(self, tenant: str, name: str, max_waiting: int | None = None) -> Future[None]:
        """Submit a function for a tenant."""
        return Context().run(self._submit, tenant, name, max_waiting)

    def _submit(self, tenant: str, name: str, max_waiting: int | None) -> Future[None]:
        work_for(tenant)
        return self._threads.submit(partial(self._wait, name), max_waiting)

    def _wait(self, name: str) -> None:
        self.begun.append(name)
        assert self._open.wait(SOON_S)

    def open(self) -> None:
        """Let all through."""
        self._open.set()


@contextmanager
def gate_of(num_threads: int, max_running: int) -> Iterator[tuple[FairThreads, Gate]]:
    """Threads, and a gate before their work."""
    threads = FairThreads("test", num_threads, max_running)
    gate = Gate(threads)
    try:
        yield threads, gate
    finally:
        gate.open()
        threads.close()


def run(threads: FairThreads, tenant: str, function: Callable[[], object] = lambda: None) -> object:
    """The result of a function that is run for a tenant."""

    def submit() -> Future[object]:
        work_for(tenant)
        return threads.submit(function)

    return Context().run(submit).result(SOON_S)


def test_a_tenant_does_not_hold_all_threads() -> None:
    """While 64 slow functions of one tenant run or wait, another's runs at once, and so does the server's own."""
    with gate_of(num_threads=4, max_running=3) as (threads, gate):
        slow = [gate.submit("a", f"a{number}") for number in range(64)]
        assert run(threads, "b", lambda: "b") == "b" and run(threads, OWN, lambda: 1) == 1
        assert sum(future.running() for future in slow) <= 3
        gate.open()
        for future in slow:
            future.result(SOON_S)


def test_the_server_s_own_work_may_have_all_threads() -> None:
    """Work that is no tenant's is not bounded: nothing that a caller does makes more of it."""
    with gate_of(num_threads=2, max_running=1) as (_, gate):
        own = [gate.submit(OWN, str(number)) for number in range(2)]
        while not all(future.running() for future in own):
            pass


def test_tenants_take_turns() -> None:
    """Of two tenants that wait each has every other turn, whoever came first and however many are behind."""
    with gate_of(num_threads=1, max_running=1) as (_, gate):
        futures = [gate.submit("a", f"a{number}") for number in range(5)]
        while not gate.begun:
            pass
        futures += [gate.submit("b", f"b{number}") for number in range(2)]
        gate.open()
        for future in futures:
            future.result(SOON_S)
        assert gate.begun == ["a0", "a1", "b0", "a2", "b1", "a3", "a4"]


def test_what_does_not_fit_is_refused_and_only_that() -> None:
    """A tenant with a full queue is told when to ask again; another tenant is not, and a place is free again later."""
    with gate_of(num_threads=1, max_running=1) as (_, gate):
        futures = [gate.submit("a", "running")]
        while not gate.begun:
            pass
        futures += [gate.submit("a", "waiting", max_waiting=2) for _ in range(2)]
        with pytest.raises(TenantLimitError, match="2 requests of the tenant a wait to be prepared") as caught:
            gate.submit("a", "refused", max_waiting=2)
        assert (caught.value.status, caught.value.param, caught.value.retry_after) == (429, "max_waiting", 1)
        futures.append(gate.submit("b", "waiting", max_waiting=2))
        assert futures.pop(1).cancel()
        futures.append(gate.submit("a", "waiting", max_waiting=2))
        gate.open()
        for future in futures:
            future.result(SOON_S)
        assert gate.begun.count("waiting") == 3


def test_what_nobody_waits_for_is_dropped_at_once() -> None:
    """A function whose caller left holds nothing, though no thread is free: its body may be megabytes."""

    class Body:
        """Something large."""

    with gate_of(num_threads=1, max_running=1) as (threads, gate):
        gate.submit("a", "running")
        while not gate.begun:
            pass
        body = Body()
        held, future = weakref.ref(body), threads.submit(partial(id, body))
        del body
        assert held() is not None and future.cancel()
        assert held() is None


def test_an_error_is_its_caller_s() -> None:
    """What a function raises is raised to whoever waits for it, and the thread goes on."""
    with gate_of(num_threads=1, max_running=1) as (threads, _):
        with pytest.raises(ZeroDivisionError):
            run(threads, "a", lambda: 1 // 0)
        assert run(threads, "a", lambda: 1) == 1
