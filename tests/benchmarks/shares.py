"""What is kept of the base's speed: the pure half of `families.py`."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from itertools import accumulate

import msgspec

from tests.benchmarks.results import Timing

BASE, MIXED = "base", "mixed"
EPSILON_S = 1e-6  # times are sums of gaps: the same one may differ in its last bits


class NeverTogetherError(Exception):
    """The requests of a batch were never answered all at once."""


class Worn(msgspec.Struct):
    """What a batch wore: adapters that differ, and the bytes that one takes on the device, the mean over them."""

    num_different: int
    slot_bytes: float


class Decode(msgspec.Struct):
    """One batch: output tokens/s while all its requests decoded."""

    method: str
    tokens_per_s: float


class Wait(msgspec.Struct):
    """The same prompts alone without a hat and with one of so many virtual tokens: milliseconds to each first token."""

    method: str
    num_virtual: int
    num_prompt: int
    without_ms: list[float] = []
    with_ms: list[float] = []

    @property
    def ratio(self) -> float:
        """Of the medians."""
        return statistics.median(self.with_ms) / statistics.median(self.without_ms)


class Families(msgspec.Struct):
    """Everything that was measured of the methods, batches in the order in which they ran."""

    num_requests: int = 0
    num_prompt: int = 0
    num_tokens: int = 0
    worn: dict[str, Worn] = {}
    decodes: list[Decode] = []
    waits: list[Wait] = []

    def shares(self) -> dict[str, list[float]]:
        """Of the base's speed, by method: each batch against the mean of the base's last before and first after it.

        Batches without a base's on either side are left out: the bench has not come that far.
        """
        kept: dict[str, list[float]] = {}
        before, after = _last_base(self.decodes), [*reversed(_last_base(self.decodes[::-1]))]
        for decode, *around in zip(self.decodes, before, after, strict=True):
            nearest = [rate for rate in around if rate is not None]
            if decode.method != BASE and len(nearest) == len(around):
                kept.setdefault(decode.method, []).append(decode.tokens_per_s / statistics.mean(nearest))
        return kept

    def rates(self, method: str) -> list[float]:
        """Output tokens/s of every batch of a method."""
        return [decode.tokens_per_s for decode in self.decodes if decode.method == method]


def _last_base(decodes: list[Decode]) -> list[float | None]:
    """For every batch the base's speed when it was last measured, itself included."""
    last, rates = None, []
    for decode in decodes:
        last = decode.tokens_per_s if decode.method == BASE else last
        rates.append(last)
    return rates


def decode_rate(timings: list[Timing]) -> float:
    """Output tokens/s from the last request's first token until the first request's last: all of them decode.

    Raises `NeverTogetherError` where there is no such time.
    """
    began = max(timing.first or 0.0 for timing in timings)
    ended = min((timing.first or 0.0) + sum(timing.gaps) for timing in timings) + EPSILON_S
    return sum(_rate_between(timing, began, ended) for timing in timings)


def _rate_between(timing: Timing, began: float, ended: float) -> float:
    """One request's tokens/s from its last piece until `began` to its last piece until `ended`."""
    times = list(accumulate(timing.gaps, initial=timing.first or 0.0))
    first, last = bisect_right(times, began) - 1, bisect_right(times, ended) - 1
    if first >= last:
        raise NeverTogetherError("a request of the batch ended before another had its first tokens")
    return sum(timing.sizes[first + 1 : last + 1]) / (times[last] - times[first])


def spread(methods: list[str], num: int) -> list[str]:
    """`num` methods at even distances, or all of them over and over where there are fewer."""
    return [methods[place * max(len(methods), num) // num % len(methods)] for place in range(num)]
