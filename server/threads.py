"""Threads that serve tenants in turn: however much work one of them brings, the next thread is another's."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, TypeVar

from server.errors import TenantLimitError

T = TypeVar("T")
OWN = ""  # the server's own work, and that of callers who are not known yet
RETRY_S = 1
_TENANT: ContextVar[str] = ContextVar("tenant", default=OWN)


def work_for(tenant: str) -> None:
    """Count the work of the rest of this context as a tenant's."""
    _TENANT.set(tenant)


class FairThreads:
    """A pool of threads that take tenants in turn. The process does not wait for them at its end: some may hang.

    A tenant has at most `max_running` threads at once, but for `OWN`, which may have all.
    """

    def __init__(self, name: str, num_threads: int, max_running: int) -> None:
        self._max_running = max_running
        self._changed = threading.Condition()
        self._waiting: dict[str, dict[Future[Any], Callable[[], Any]]] = {}  # by tenant, in the order of their turns
        self._running: Counter[str] = Counter()
        self._is_closed = False
        for number in range(num_threads):
            threading.Thread(target=self._run, name=f"{name}_{number}", daemon=True).start()

    def submit(self, function: Callable[[], T], max_waiting: int | None = None) -> Future[T]:
        """Run a function in this context, by the first thread that is free when it is the tenant's turn.

        Raises `TenantLimitError` if the tenant has `max_waiting` functions waiting already.
        """
        tenant, future = _TENANT.get(), Future[T]()
        with self._changed:
            waiting = self._waiting.setdefault(tenant, {})
            if max_waiting is not None and len(waiting) >= max_waiting:
                raise TenantLimitError(
                    f"{max_waiting} requests of the tenant {tenant} wait to be prepared: ask again in a moment",
                    "max_waiting",
                    RETRY_S,
                )
            waiting[future] = partial(copy_context().run, function)
            self._changed.notify()
        future.add_done_callback(partial(self._drop_cancelled, tenant))
        return future

    def close(self) -> None:
        """End the threads once nothing waits that they can run."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _drop_cancelled(self, tenant: str, future: Future[Any]) -> None:
        """Take a function that nobody waits for out of the queue, and what it holds with it."""
        if future.cancelled():
            with self._changed:
                if self._waiting.get(tenant, {}).pop(future, None) and not self._waiting[tenant]:
                    del self._waiting[tenant]

    def _run(self) -> None:
        while (turn := self._next_turn()) is not None:
            tenant, future, function = turn
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function())
                except BaseException as error:  # noqa: BLE001 - whoever waits for the future raises it
                    future.set_exception(error)
            del turn, future, function  # what they hold goes now, not with the next turn
            with self._changed:
                self._running[tenant] -= 1
                self._running += Counter()  # drops the zeros

    def _next_turn(self) -> tuple[str, Future[Any], Callable[[], Any]] | None:
        """Wait for a tenant that may have a thread, and take its first function. Returns None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._next_tenant() is not None)
            if (tenant := self._next_tenant()) is None:
                return None
            waiting = self._waiting.pop(tenant)
            future = next(iter(waiting))
            function = waiting.pop(future)
            if waiting:
                self._waiting[tenant] = waiting  # behind the others
            self._running[tenant] += 1
            return tenant, future, function

    def _next_tenant(self) -> str | None:
        may_run = (tenant for tenant in self._waiting if tenant == OWN or self._running[tenant] < self._max_running)
        return next(may_run, None)
