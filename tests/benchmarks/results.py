"""What a run of a workload gave, and the figures of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable

import msgspec
import numpy as np

PERCENTILES = (50, 95, 99)


class Timing(msgspec.Struct):
    """One request, in seconds since the run began; `gaps` are those between neighbouring pieces of the answer.

    `sizes` are the tokens of each piece. A peer that does not stream has neither `first` nor `gaps` nor `sizes`.
    """

    num_prompt: int
    num_tokens: int
    started: float
    ended: float
    first: float | None = None
    gaps: list[float] = []
    sizes: list[int] = []


class Run(msgspec.Struct):
    """One workload on one peer, once: every request was answered in full.

    `memory_mib` is the peer's memory right after it; `counted` is what the server's own counters rose by meanwhile;
    `limit_per_s` the output tokens/s that the machine could have reached, by what was measured of it right before.
    """

    peer: str
    workload: str
    seconds: float
    timings: list[Timing]
    memory_mib: float | None = None
    counted: dict[str, float] = {}
    offered_per_s: float | None = None  # requests, of an open loop
    limit_per_s: float | None = None


class Figures(msgspec.Struct):
    """Of one workload on one peer, the medians over its runs. Milliseconds by "mean", "p50", "p95", "p99"."""

    output_tokens_per_s: float
    total_tokens_per_s: float
    ttft_ms: dict[str, float]
    inter_token_ms: dict[str, float]
    latency_ms: dict[str, float]
    requests_per_s: float = 0.0
    stream_tokens_per_s: float | None = None  # of one stream after its first piece
    memory_mib: float | None = None
    counted: dict[str, float] = {}
    of_limit: float | None = None  # the share of what the machine could have reached


def figures(runs: list[Run]) -> Figures:
    """The medians over the runs of one workload on one peer."""
    each = [_of_one(run) for run in runs]
    return Figures(
        statistics.median(one.output_tokens_per_s for one in each),
        statistics.median(one.total_tokens_per_s for one in each),
        _medians(one.ttft_ms for one in each),
        _medians(one.inter_token_ms for one in each),
        _medians(one.latency_ms for one in each),
        statistics.median(one.requests_per_s for one in each),
        _median(one.stream_tokens_per_s for one in each),
        _median(one.memory_mib for one in each),
        _medians(one.counted for one in each),
        _median(one.of_limit for one in each),
    )


def _of_one(run: Run) -> Figures:
    num_output = sum(timing.num_tokens for timing in run.timings)
    num_prompt = sum(timing.num_prompt for timing in run.timings)
    return Figures(
        num_output / run.seconds,
        (num_output + num_prompt) / run.seconds,
        _spread(timing.first - timing.started for timing in run.timings if timing.first is not None),
        _spread(gap for timing in run.timings for gap in timing.gaps),
        _spread(timing.ended - timing.started for timing in run.timings),
        len(run.timings) / run.seconds,
        _stream_rate(run.timings),
        run.memory_mib,
        run.counted,
        None if run.limit_per_s is None else num_output / run.seconds / run.limit_per_s,
    )


def _stream_rate(timings: list[Timing]) -> float | None:
    """Tokens after the first piece over the time that they took; None where nothing was streamed."""
    seconds = sum(sum(timing.gaps) for timing in timings if timing.sizes)
    num_tokens = sum(sum(timing.sizes[1:]) for timing in timings)
    return num_tokens / seconds if seconds else None


def _spread(seconds: Iterable[float]) -> dict[str, float]:
    """Mean and percentiles in milliseconds; empty for nothing."""
    values = 1e3 * np.array(list(seconds))
    if not len(values):
        return {}
    return {"mean": float(values.mean())} | {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}


def _medians(spreads: Iterable[dict[str, float]]) -> dict[str, float]:
    spreads = list(spreads)
    return {key: statistics.median(spread[key] for spread in spreads) for key in spreads[0]}


def _median(values: Iterable[float | None]) -> float | None:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
