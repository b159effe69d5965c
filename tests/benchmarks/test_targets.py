"""The figures to reach."""

from __future__ import annotations

from tests.benchmarks.bench import Bench
from tests.benchmarks.machine import Machine
from tests.benchmarks.results import Run, Timing
from tests.benchmarks.shares import Decode, Families
from tests.benchmarks.targets import TARGETS, outcomes


def run(peer: str, workload: str, seconds: float, first: float = 0.5, gap: float = 0.1) -> Run:
    """One request of 11 tokens, streamed."""
    return Run(peer, workload, seconds, [Timing(5, 11, 0.0, seconds, first, [gap] * 10, [1] * 11)], limit_per_s=10.0)


def bench_of(*runs: Run) -> Bench:
    return Bench(Machine("a CPU", 2, 2, 0.1, 100.0, 10.0, {}), "base", "auto", {}, {}, [*runs])


def said(bench: Bench) -> dict[str, tuple[str, str]]:
    """What is shown of each figure that was measured."""
    return {one.target.title: (one.shown, one.verdict) for one in outcomes(bench) if one.value is not None}


def test_a_figure_is_reached_or_not_or_not_measured() -> None:
    """At least and at most are told apart; what lacks a side is not measured."""
    bench = bench_of(
        run("manyhats", "W3", 2.0),
        run("peft", "W3", 9.0),
        run("llama", "W3", 4.0, first=4.0),
        run("manyhats", "W6", 2.0),
    )
    assert said(bench) == {
        "W3 output tokens/s against PEFT's mixed batch of 16": ("4.50x", "**no**"),
        "W3 against llama-server Q8_0": ("2.00x", "**no**"),
        "W3 TTFT p95 against llama-server's": ("0.12x", "**no**"),
        "W3 share of the machine's limit": ("0.55", "**no**"),
        "W6 p99 inter-token against W3's": ("1.00x", "yes"),
    }
    assert sum(one.shown == "not measured" for one in outcomes(bench)) == len(TARGETS) - 5


def test_one_streams_speed_is_of_its_gaps() -> None:
    """W1's figures compare tokens after the first over the time that they took, not the whole run."""
    bench = bench_of(run("manyhats", "W1", 60.0, gap=0.1), run("llama", "W1", 1.5, gap=0.05))
    assert said(bench) == {"W1 decode against llama-server Q8_0": ("0.50x", "**no**")}


def test_soft_prompts_keep_what_the_worse_of_them_keeps() -> None:
    """Prompt tuning and prefix tuning are one figure: the least of the two."""
    bench = bench_of()
    rates = [("base", 100.0), ("prompt-tuning", 99.0), ("prefix-tuning", 96.0), ("base", 100.0)]
    bench.families = Families(decodes=[Decode(*one) for one in rates])
    assert said(bench) == {"decode kept: soft prompts": ("0.96", "**no**")}


def test_what_the_server_is_as_a_whole() -> None:
    """Memory in GB, not GiB, and the median start."""
    bench = bench_of()
    facts = [{"start_to_ready_s": second, "memory_above_base_at_start_mib": 953.0} for second in (7.0, 9.0, 7.5)]
    bench.facts = {"manyhats": facts}
    assert said(bench) == {
        "memory above the base's weights, at start": ("1.00 GB", "yes"),
        "start to ready with a converted base": ("7.5 s", "yes"),
    }
