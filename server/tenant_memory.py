"""Forget deleted tenants, tasks and versions in every room that keeps something in memory of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

Key = tuple[str, str | None, int | None]  # a tenant, its task (None: all of it), a version of that (None: all)


class TenantMemory(Protocol):
    """Keeps something in memory by tenant, by task or by version."""

    def forget(self, tenant: str, task: str | None = None, number: int | None = None) -> None:
        """Forget a tenant, its task or a version of that, which was deleted."""
        ...


class TenantMemories:
    """Tells every room to forget: at the deletion, and again once the requests that had begun by then have ended.

    Such a request may have read the tenant, the task or the version before, and write of it afterwards.
    """

    def __init__(self, memories: Sequence[TenantMemory]) -> None:
        self._memories = memories
        self._num_begun = 0  # requests, which are numbered so
        self._running: dict[str, dict[int, None]] = {}  # numbers of requests by tenant, the oldest first
        self._deleted: dict[Key, int] = {}  # with the number of the last request that may write of it

    @contextmanager
    def in_flight(self, tenant: str) -> Iterator[None]:
        """Know of a tenant's request while the block runs."""
        self._num_begun += 1
        number, running = self._num_begun, self._running.setdefault(tenant, {})
        running[number] = None
        try:
            yield
        finally:
            del running[number]
            if not running:
                del self._running[tenant]
            self._forget_again(tenant, next(iter(running), self._num_begun + 1))

    def forget(self, tenant: str, task: str | None = None, number: int | None = None) -> None:
        """Forget what was deleted."""
        self._forget((tenant, task, number))
        if tenant in self._running:
            self._deleted[tenant, task, number] = self._num_begun

    def _forget_again(self, tenant: str, oldest: int) -> None:
        """Forget what was deleted before the oldest of the tenant's requests began."""
        for key in [key for key, last in self._deleted.items() if key[0] == tenant and last < oldest]:
            del self._deleted[key]
            self._forget(key)

    def _forget(self, key: Key) -> None:
        for memory in self._memories:
            memory.forget(*key)
