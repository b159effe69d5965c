"""The figures to reach: each is a bound on one number that a bench can have measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

from tests.benchmarks.bench import Bench
from tests.benchmarks.peers import ME, UNCACHED
from tests.benchmarks.results import Figures
from tests.benchmarks.shares import MIXED

Read = Callable[[Figures], float | None]
Measure = Callable[[Bench], float | None]
GB_OF_MIB = 2**20 / 1e9


class Target(NamedTuple):
    """`form` shows a number, as `{:.2f}x`."""

    title: str
    bound: float
    form: str
    measure: Measure
    is_most: bool = False  # the bound is the most, not the least

    def is_reached(self, value: float) -> bool:
        """Whether a value is on the right side."""
        return value <= self.bound if self.is_most else value >= self.bound

    def to_reach(self) -> str:
        """The bound in words."""
        return f"{'<=' if self.is_most else '>='} {self.form.format(self.bound)}"


def _speed(one: Figures) -> float | None:
    return one.output_tokens_per_s


def _stream(one: Figures) -> float | None:
    return one.stream_tokens_per_s


def _ttft_p95(one: Figures) -> float | None:
    return one.ttft_ms.get("p95")


def _gap_p99(one: Figures) -> float | None:
    return one.inter_token_ms.get("p99")


def against(read: Read, of: tuple[str, str], other: tuple[str, str]) -> Measure:
    """A figure of one (peer, workload) over that of another; None where either is missing."""

    def measure(bench: Bench) -> float | None:
        measured = bench.figures()
        values = [read(measured[key]) if key in measured else None for key in (of, other)]
        return values[0] / values[1] if values[0] is not None and values[1] else None

    return measure


def of_the_limit(workload: str) -> Measure:
    """The share of the machine's own limit that our server reaches."""

    def measure(bench: Bench) -> float | None:
        one = bench.figures().get((ME, workload))
        return one.of_limit if one else None

    return measure


def kept(*methods: str) -> Measure:
    """The least share of the base's decode speed that any of the methods keeps; None unless all were measured."""

    def measure(bench: Bench) -> float | None:
        shares = bench.families.shares()
        return min(statistics.median(shares[method]) for method in methods) if {*methods} <= {*shares} else None

    return measure


def fact(name: str, times: float = 1.0) -> Measure:
    """The median of a fact of our server."""

    def measure(bench: Bench) -> float | None:
        values = [facts[name] for facts in bench.facts.get(ME, []) if name in facts]
        return times * statistics.median(values) if values else None

    return measure


def _ratio(value: float | None, other: float | None) -> float | None:
    return value / other if value is not None and other else None


def _swaps_cost(bench: Bench) -> float | None:
    return _ratio(bench.churn.swapping_p95_ms, bench.churn.before_p95_ms)


def _swaps_faults(bench: Bench) -> float | None:
    return bench.churn.num_faults if bench.churn.num_swaps else None


def _cliff_gap(bench: Bench) -> float | None:
    return _ratio(bench.churn.cold_gap_p99_ms, bench.churn.warm_gap_p99_ms)


def _cliff_ttft(bench: Bench) -> float | None:
    churn = bench.churn
    return churn.warm_ttft_p95_ms and _ratio(churn.cold_ttft_p95_ms, churn.warm_ttft_p95_ms + 2 * churn.load_ms)


def _stall(bench: Bench) -> float | None:
    return bench.churn.stall_ms if bench.churn.num_loads else None


def _mine(workload: str) -> tuple[str, str]:
    return ME, workload


X, SHARE = "{:.2f}x", "{:.2f}"
TARGETS = [
    Target("W3 output tokens/s against PEFT's mixed batch of 16", 5, X, against(_speed, _mine("W3"), ("peft", "W3"))),
    Target("W3 against llama-server Q8_0", 2.4, X, against(_speed, _mine("W3"), ("llama", "W3"))),
    Target(
        "W3 TTFT p95 against llama-server's", 0.1, X, against(_ttft_p95, _mine("W3"), ("llama", "W3")), is_most=True
    ),
    Target("W3 / W4 of this server: what mixing costs", 0.85, SHARE, against(_speed, _mine("W3"), _mine("W4"))),
    Target("W3 against OpenVINO, grouped by adapter", 2.7, X, against(_speed, _mine("W3"), ("openvino", "W3"))),
    Target("W4 against OpenVINO's base", 0.9, X, against(_speed, _mine("W4"), ("openvino", "W4"))),
    Target("W4 against llama-server's base", 1.3, X, against(_speed, _mine("W4"), ("llama", "W4"))),
    Target("W1 decode against OpenVINO fp16", 0.95, X, against(_stream, _mine("W1"), ("openvino", "W1"))),
    Target("W1 decode against llama-server Q8_0", 0.85, X, against(_stream, _mine("W1"), ("llama", "W1"))),
    Target("W3 share of the machine's limit", 0.60, SHARE, of_the_limit("W3")),
    Target("decode kept: LoRA r=8 on all linear layers", 0.85, SHARE, kept("lora-r8")),
    Target("decode kept: bottleneck 16", 0.90, SHARE, kept("bottleneck-16")),
    Target("decode kept: soft prompts", 0.97, SHARE, kept("prompt-tuning", "prefix-tuning")),
    Target("decode kept: all methods mixed", 0.85, SHARE, kept(MIXED)),
    Target("W5 against the same without the prefix cache", 3, X, against(_speed, _mine("W5"), (UNCACHED, "W5"))),
    Target("W6 p99 inter-token against W3's", 1.3, X, against(_gap_p99, _mine("W6"), _mine("W3")), is_most=True),
    Target("200 version swaps a minute: p95 latency against before", 1.5, X, _swaps_cost, is_most=True),
    Target("200 version swaps a minute: refused, or of an older version", 0, "{:.0f}", _swaps_faults, is_most=True),
    Target("4x as many adapters as slots: p99 gap of streams against all fit", 1.3, X, _cliff_gap, is_most=True),
    Target("4x: TTFT p95 of cold against warm p95 + 2 loads", 1.0, X, _cliff_ttft, is_most=True),
    Target("4x: steps that waited for adapters, all in all", 0, "{:.1f} ms", _stall, is_most=True),
    Target(
        "memory above the base's weights, at start",
        1.0,
        "{:.2f} GB",
        fact("memory_above_base_at_start_mib", GB_OF_MIB),
        is_most=True,
    ),
    Target("start to ready with a converted base", 8, "{:.1f} s", fact("start_to_ready_s"), is_most=True),
]


class Outcome(NamedTuple):
    """A target and what came of it; `value` is None where it was not measured."""

    target: Target
    value: float | None

    @property
    def shown(self) -> str:
        """The value in words."""
        return "not measured" if self.value is None else self.target.form.format(self.value)

    @property
    def verdict(self) -> str:
        """ "yes", "no" or a dash."""
        return "-" if self.value is None else "yes" if self.target.is_reached(self.value) else "**no**"


def outcomes(bench: Bench) -> list[Outcome]:
    """What came of every target."""
    return [Outcome(target, target.measure(bench)) for target in TARGETS]
