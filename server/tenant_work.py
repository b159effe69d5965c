"""Do the work whose cost is a stranger's choice apart from what the server does for everyone.

Tokenising, chat templates, JSON, archives and adapters' files are as long as somebody made them. They have threads of
their own, so that identifying callers, resolving tasks and counting tokens go on beside them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from adapters_store.cores import num_cores
from server.threads import FairThreads

P = ParamSpec("P")
T = TypeVar("T")
MIN_THREADS, MAX_THREADS = 4, 32


class TenantWork:
    """Threads for the work of tenants, by turns: one tenant has at most half of them, and `max_waiting` waiting."""

    def __init__(self, max_waiting: int) -> None:
        num_threads = min(max(MIN_THREADS, num_cores()), MAX_THREADS)
        self._threads = FairThreads("tenant_work", num_threads, num_threads // 2)
        self._max_waiting = max_waiting

    async def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a function, run for the tenant of this context. Raises `TenantLimitError` if too many wait."""
        job = self._threads.submit(partial(function, *args, **kwargs), self._max_waiting)
        return await asyncio.wrap_future(job)

    def close(self) -> None:
        """End the threads, each after what it runs."""
        self._threads.close()
