"""Limit what tenants do in a minute and at once, and say when they may again."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from adapters_store.registry.tenants import TenantLimits
from server.errors import BadRequestError, ServerError, TenantLimitError

MINUTE = 60
FIRST_PACE_S = 1.0  # between two first tokens of a tenant, before any was seen
PACE_WEIGHT = 0.2  # of the newest


class SlidingWindow:
    """Counts amounts by second over the last minute, to hold a limit in any 60 seconds."""

    def __init__(self) -> None:
        self._taken: deque[list[int]] = deque()  # [second, amount]
        self._sum = 0

    def wait_s(self, amount: int, limit: int, now: float) -> int:
        """Seconds (rounded up) until `amount` more fits under `limit` in any 60 s; 0 if it fits now."""
        self._drop(now)
        over, wait = self._sum + amount - limit, 0
        for second, taken in self._taken:
            if over <= 0:
                break
            over -= taken
            wait = math.ceil(second + MINUTE + 1 - now)
        return wait

    def take(self, amount: int, now: float) -> int:
        """Count an amount. Returns the second that it is counted in, for `give_back`."""
        second = int(now)
        if not self._taken or self._taken[-1][0] < second:
            self._taken.append([second, 0])
        self._taken[-1][1] += amount
        self._sum += amount
        return second

    def give_back(self, amount: int, second: int) -> None:
        """Take an amount off the count of a second; a second older than a minute does not matter any more."""
        for entry in self._taken:
            if entry[0] == second:
                entry[1] -= amount
                self._sum -= amount

    def _drop(self, now: float) -> None:
        while self._taken and self._taken[0][0] + MINUTE + 1 <= now:
            self._sum -= self._taken.popleft()[1]


class GenerationProgress(Protocol):
    """The progress of a request's answers, as limits see it."""

    @property
    def num_begun(self) -> int:
        """Choices that have a token."""
        ...

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts and of what was answered."""
        ...


class TenantUsage:
    """A tenant's requests, looks (they change nothing) and tokens of a minute, and its requests in progress."""

    def __init__(self) -> None:
        self.requests, self.tokens, self.looks = SlidingWindow(), SlidingWindow(), SlidingWindow()
        self.open: dict[int, tuple[int, GenerationProgress]] = {}  # of requests that are answered: choices, progress
        self.pace_s = FIRST_PACE_S

    @property
    def num_queued(self) -> int:
        """Choices that have no token yet."""
        return sum(num_choices - progress.num_begun for num_choices, progress in self.open.values())


class RateLimiter:
    """Holds every tenant's usage against its limits. All calls come from the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._usages: dict[str, TenantUsage] = {}

    def forget(self, tenant: str, task: str | None = None, number: int | None = None) -> None:  # noqa: ARG002 - as others
        """Forget a tenant that was deleted."""
        if task is None:
            self._usages.pop(tenant, None)

    def count_request(self, tenant: str, limits: TenantLimits, is_look: bool = False) -> None:
        """Count a request, or a look, which takes nothing of the requests and has as many a minute.

        Raises `TenantLimitError` with the seconds after which one more is let in.
        """
        if limits.requests_per_minute is None:
            return
        usage, now = self._usage_of(tenant), self._clock()
        window = usage.looks if is_look else usage.requests
        if wait := window.wait_s(1, limits.requests_per_minute, now):
            raise TenantLimitError(
                f"the tenant {tenant} may ask {limits.requests_per_minute} times a minute", "requests_per_minute", wait
            )
        window.take(1, now)

    @contextmanager
    def generating(
        self, tenant: str, limits: TenantLimits, num_choices: int, max_total_tokens: int, progress: GenerationProgress
    ) -> Iterator[None]:
        """Count a request while the block runs: as queued or running, and as `max_total_tokens`; then by its tokens.

        One that fails before its first token took none.

        Raises `TenantLimitError`, or `BadRequestError` if waiting would not help.
        """
        usage, began = self._usage_of(tenant), self._clock()
        self._check_queue(tenant, usage, limits, num_choices)
        second = self._take_tokens(tenant, usage, limits, max_total_tokens, began)
        usage.open[id(progress)] = num_choices, progress
        is_free = False
        try:
            yield
        except ServerError:
            is_free = not progress.num_begun
            raise
        finally:
            del usage.open[id(progress)]
            if second is not None:
                num_tokens = 0 if is_free else progress.num_tokens
                usage.tokens.give_back(max_total_tokens - num_tokens, second)
            if progress.num_begun:
                newest = (self._clock() - began) / progress.num_begun
                usage.pace_s += PACE_WEIGHT * (newest - usage.pace_s)

    def _usage_of(self, tenant: str) -> TenantUsage:
        return self._usages.setdefault(tenant, TenantUsage())

    def _check_queue(self, tenant: str, usage: TenantUsage, limits: TenantLimits, num_choices: int) -> None:
        """Raise `TenantLimitError` for a full queue; the wait is estimated from the pace of this tenant's answers."""
        limit = limits.max_queued
        if limit is None:
            return
        if num_choices > limit:
            raise BadRequestError(f"{num_choices} answers at once are over the {limit} that {tenant} may queue", "n")
        over = usage.num_queued + num_choices - limit
        if over > 0:
            wait = max(1, math.ceil(over * usage.pace_s))
            raise TenantLimitError(f"{limit} answers of the tenant {tenant} wait already", "max_queued", wait)

    def _take_tokens(
        self, tenant: str, usage: TenantUsage, limits: TenantLimits, amount: int, now: float
    ) -> int | None:
        limit = limits.tokens_per_minute
        if limit is None:
            return None
        if amount > limit:
            raise BadRequestError(
                f"prompt and max_tokens of all answers are {amount} tokens; the tenant {tenant} has {limit} a minute",
                "max_tokens",
            )
        if wait := usage.tokens.wait_s(amount, limit, now):
            raise TenantLimitError(f"the tenant {tenant} has {limit} tokens a minute", "tokens_per_minute", wait)
        return usage.tokens.take(amount, now)
