"""Buffer usage and write it in batches; a response is completed only when its usage is durable (or after 2 s)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from adapters_store.registry.registry import Registry, UsageKey
from server.logs import cause_of
from server.metrics import Metrics
from server.stores import Stores

log = logging.getLogger(__name__)
EVERY_S = 1.0  # what running answers have used by then is written
PATIENCE_S = 2.0  # an answer does not wait longer for its usage to be written
MAX_RETRY_S = 60.0  # after a failure; it doubles from `EVERY_S` on

Counts = tuple[int, int, int]  # requests, prompt tokens, completion tokens


@dataclass
class UsageMeter:
    """Meters one request: `used()` is its usage so far, `counted` the part of it that is in the buffer."""

    places: list[UsageKey]
    used: Callable[[], Counts]
    counted: Counts = (0, 0, 0)


class UsageBuffer:
    """Counts usage in memory, and writes all of it in one transaction: at the end of an answer, and once a second."""

    def __init__(self, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics, self._clock = metrics, clock
        self._wait_s, self._retry_at = 0.0, 0.0  # of writing, after failures in a row
        self._lock, self._flush_lock = threading.Lock(), asyncio.Lock()
        self._counts: dict[UsageKey, list[int]] = {}
        self._open: dict[int, UsageMeter] = {}

    @contextmanager
    def running(self, meter: UsageMeter) -> Iterator[None]:
        """Count a request's usage at every flush while the block runs, and the rest at its end."""
        with self._lock:
            self._open[id(meter)] = meter
        try:
            yield
        finally:
            with self._lock:
                del self._open[id(meter)]
                self._count(meter)

    async def wait_until_durable(self, stores: Stores) -> None:
        """Return once all usage counted before is durable, or after `PATIENCE_S`. Concurrent calls share one write."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S), self._flush_lock:
                if self._counts:
                    await self.flush_or_log(stores)

    async def flush_or_log(self, stores: Stores) -> None:
        """Write all usage counted until now; if the registry fails it is kept and logged, and tried again later."""
        if self._clock() < self._retry_at:
            return
        if self._wait_s:
            self._metrics.retries.labels("usage").inc()
        try:
            await stores.database.call(self.flush, stores.registry)
            self._wait_s = 0.0
        except Exception as error:  # noqa: BLE001 - whatever fails, the answer that was counted is whole
            self._wait_s = min(max(EVERY_S, 2 * self._wait_s), MAX_RETRY_S)
            self._retry_at = self._clock() + self._wait_s
            log.warning("usage was not written yet; it is kept", extra=cause_of(error, wait_s=self._wait_s))

    async def close(self, stores: Stores) -> None:
        """Write all usage counted until now, at the end of the server."""
        self._retry_at = 0.0
        await self.flush_or_log(stores)

    def flush(self, registry: Registry) -> None:
        """Write all usage counted until now; if the registry fails it is kept, and the error raised."""
        with self._lock:
            for meter in self._open.values():
                self._count(meter)
            taken, self._counts = self._counts, {}
        if not taken:
            return
        try:
            registry.add_usages(taken)
        except Exception:
            with self._lock:
                for place, counts in taken.items():
                    self._add(place, counts)
            raise

    async def keep_flushing(self, stores: Stores) -> None:
        """Flush once a second until cancelled."""
        while True:
            await asyncio.sleep(EVERY_S)
            async with self._flush_lock:
                if self._counts or self._open:
                    await self.flush_or_log(stores)

    def _count(self, meter: UsageMeter) -> None:
        used = meter.used()
        more = [now - before for now, before in zip(used, meter.counted, strict=True)]
        meter.counted = used
        if any(more):
            for place in meter.places:
                self._add(place, more)

    def _add(self, place: UsageKey, counts: list[int]) -> None:
        known = self._counts.setdefault(place, [0, 0, 0])
        for index, count in enumerate(counts):
            known[index] += count
