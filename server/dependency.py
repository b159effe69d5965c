"""Call services outside of this process so that one that hangs is as one that is dead.

Each (the registry's database, the store of artifacts) has threads of its own, of which a tenant has half at most, a
deadline, and a circuit breaker.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

from server.metrics import Metrics
from server.threads import FairThreads

log = logging.getLogger(__name__)

CHECK_EVERY_S = 1.0
FIRST_WAIT_S, MAX_WAIT_S = 0.5, 5.0  # between two checks of one that does not answer; it doubles
P = ParamSpec("P")
T = TypeVar("T")


class Dependency:
    """A service outside of this process, with the threads that call it and a circuit breaker.

    `down` is the error of a call that found the service not answering; a subclass of it says that it answered. A call
    that raises `down`, or is late, opens the breaker: until `watch` has had an answer, all calls raise `down` at once.
    """

    def __init__(self, name: str, num_threads: int, limit_s: float, down: type[Exception], metrics: Metrics) -> None:
        self.name, self.limit_s = name, limit_s
        self.failure: str | None = None  # the reason why it cannot be used as it should, for the operator
        self._is_open = False
        self._down, self._metrics = down, metrics
        self._threads = FairThreads(name, num_threads, max(1, num_threads // 2))
        metrics.dependency_up.labels(name).set(1)

    def require_up(self) -> None:
        """Raise `down` if the service did not answer when it was last called."""
        if self._is_open:
            self._metrics.dependency_failures.labels(self.name, "refused").inc()
            raise self._refusal()

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a blocking call of the service, or `down` if that takes longer than `limit_s`."""
        return await self.call_within(self.limit_s, partial(function, *args, **kwargs))

    async def call_within(self, limit_s: float | None, function: Callable[[], T]) -> T:
        """The result of a blocking call of the service, or `down` if that takes longer than `limit_s` (None: any)."""
        self.require_up()

        def run() -> T:
            if self._is_open:  # by now: it may have waited for a thread
                raise self._refusal()
            return function()

        return await self._run(limit_s, run)

    async def watch(self, check: Callable[[], None]) -> None:
        """Check the service until cancelled: once a second, or after a growing wait while it does not answer."""
        retry_s = FIRST_WAIT_S
        while True:
            await asyncio.sleep(CHECK_EVERY_S if self.failure is None else retry_s)
            try:
                await self._run(self.limit_s, check)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is what `ready` says
                self._metrics.dependency_failures.labels(self.name, "check").inc()
                retry_s = FIRST_WAIT_S if self.failure is None else min(2 * retry_s, MAX_WAIT_S)
                self._fail(str(error) or type(error).__name__)
            else:
                retry_s = FIRST_WAIT_S
                self._recover()

    def close(self) -> None:
        """End the threads, but those that hang."""
        self._threads.close()

    async def _run(self, limit_s: float | None, function: Callable[[], T]) -> T:
        began = time.monotonic()
        future = self._threads.submit(function)
        try:
            async with asyncio.timeout(limit_s) as limit:
                return await asyncio.wrap_future(future)
        except TimeoutError:
            if not limit.expired():
                raise
            self._metrics.dependency_failures.labels(self.name, "late").inc()
            message = f"the {self.name} did not answer within {time.monotonic() - began:.1f} s"
            if not future.cancelled():  # else it waited for a thread, and says nothing of the service
                self._open(message)
            raise self._down(message) from None
        except self._down as error:
            if type(error) is self._down and not self._is_open:
                self._metrics.dependency_failures.labels(self.name, "down").inc()
                self._open(str(error))
            raise

    def _refusal(self) -> Exception:
        return self._down(f"{self.failure}; ask again in a moment")

    def _open(self, reason: str) -> None:
        self._is_open = True
        self._fail(reason)

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            log.warning("the %s fails", self.name, extra={"reason": reason})
        self.failure = reason
        self._metrics.dependency_up.labels(self.name).set(0)

    def _recover(self) -> None:
        if self.failure is not None:
            log.info("the %s answers again", self.name)
        self._is_open, self.failure = False, None
        self._metrics.dependency_up.labels(self.name).set(1)
