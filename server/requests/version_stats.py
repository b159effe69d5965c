"""Outcomes of each version's last requests, so that a canary can be judged beside the version that it may replace."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass
from statistics import quantiles
from typing import Any

MAX_VERSIONS = 1000  # the least recently used are forgotten
MAX_REQUESTS = 200  # of a version


@dataclass(frozen=True)
class RequestOutcome:
    """The outcome of a request that was not cancelled: its status, and milliseconds if it was answered."""

    status: str
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    num_tokens: int = 0


class Recent:
    """The last outcomes by (tenant, task, version); since this server started."""

    def __init__(self) -> None:
        self._outcomes: OrderedDict[tuple[str, str, int], deque[RequestOutcome]] = OrderedDict()

    def add(self, key: tuple[str, str, int], outcome: RequestOutcome) -> None:
        """Record how a request of a version ended."""
        self._outcomes.setdefault(key, deque(maxlen=MAX_REQUESTS)).append(outcome)
        self._outcomes.move_to_end(key)
        if len(self._outcomes) > MAX_VERSIONS:
            self._outcomes.popitem(last=False)

    def of(self, key: tuple[str, str, int]) -> list[RequestOutcome]:
        """A copy of a version's last outcomes, which `summary` may take in another thread."""
        return list(self._outcomes.get(key, ()))

    def forget(self, tenant: str, task: str | None = None, number: int | None = None) -> None:
        """Forget the outcomes of a tenant, of its task or of a version of that, which was deleted."""
        gone = tuple(part for part in (tenant, task, number) if part is not None)
        for key in [key for key in self._outcomes if key[: len(gone)] == gone]:
            del self._outcomes[key]


def summary(outcomes: list[RequestOutcome]) -> dict[str, Any]:
    """Counts of requests and failures, and medians and 95th percentiles of the times of those that did not fail."""
    good = [outcome for outcome in outcomes if outcome.status == "200"]
    return {
        "requests": len(outcomes),
        "failed": len(outcomes) - len(good),
        "ttft_ms": _spread([outcome.ttft_ms for outcome in good]),
        "latency_ms": _spread([outcome.total_ms for outcome in good]),
        "tokens": sum(outcome.num_tokens for outcome in good),
    }


def _spread(values: list[float]) -> dict[str, float] | None:
    """The median and 95th percentile, or None for no values."""
    if not values:
        return None
    cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
    return {"p50": round(cuts[9], 3), "p95": round(cuts[18], 3)}
