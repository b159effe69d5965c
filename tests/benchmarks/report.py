"""What came out of a bench: bench.json (everything), bench.md (tables), bench.png (a plot)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from tests.benchmarks.bench import Bench
from tests.benchmarks.churn import Churn
from tests.benchmarks.peers import ME, UNCACHED
from tests.benchmarks.plot import plot
from tests.benchmarks.results import PERCENTILES, Figures
from tests.benchmarks.shares import BASE, Families
from tests.benchmarks.targets import outcomes

TABLE_PERCENTILES = ["mean", *(f"p{percentile}" for percentile in PERCENTILES)]


class Ratio(NamedTuple):
    """Output tokens/s of one workload on one peer against another."""

    title: str
    of: tuple[str, str]
    against: tuple[str, str]


RATIOS = [
    Ratio("W3 against PEFT's mixed batch of 16", (ME, "W3"), ("peft", "W3")),
    Ratio("W2 against PEFT's same-adapter batch of 16", (ME, "W2"), ("peft", "W2")),
    Ratio("W4 against PEFT's base batch of 16", (ME, "W4"), ("peft", "W4")),
    Ratio("W1 against PEFT's single stream", (ME, "W1"), ("peft", "W1")),
    Ratio("W3 / W4 of the same server: what mixing costs", (ME, "W3"), (ME, "W4")),
    Ratio("W3 / W2 of the same server: many adapters against one", (ME, "W3"), (ME, "W2")),
    Ratio("W3 uniform / W3 Zipf of the same server", (ME, "W3-uniform"), (ME, "W3")),
    Ratio("W6 / W3 of the same server: more adapters than fit", (ME, "W6"), (ME, "W3")),
    Ratio("W5 / W5 without the prefix cache", (ME, "W5"), (UNCACHED, "W5")),
    Ratio("W3 against OpenVINO, grouped by adapter", (ME, "W3"), ("openvino", "W3")),
    Ratio("W4 against OpenVINO's base", (ME, "W4"), ("openvino", "W4")),
    Ratio("W3 against llama-server", (ME, "W3"), ("llama", "W3")),
    Ratio("W4 against llama-server's base", (ME, "W4"), ("llama", "W4")),
    Ratio("W3 against vLLM", (ME, "W3"), ("vllm", "W3")),
]


def write(bench: Bench, folder: Path) -> None:
    """Write the three files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = bench.figures()
    summary = {
        "figures": {f"{peer} {workload}": one for (peer, workload), one in measured.items()},
        "ratios": dict(ratios(measured)),
        "facts": {peer: _medians(facts) for peer, facts in bench.facts.items()},
        "families": _summary(bench.families),
        "targets": {
            one.target.title: {"to_reach": one.target.to_reach(), "measured": one.value} for one in outcomes(bench)
        },
    }
    everything = {"summary": summary, "bench": bench}
    (folder / "bench.json").write_bytes(msgspec.json.format(msgspec.json.encode(everything), indent=1) + b"\n")
    (folder / "bench.md").write_text(markdown(bench))
    plot(bench, folder / "bench.png")


def ratios(measured: dict[tuple[str, str], Figures]) -> list[tuple[str, float]]:
    """Those of `RATIOS` whose both sides were measured."""
    return [
        (ratio.title, measured[ratio.of].output_tokens_per_s / measured[ratio.against].output_tokens_per_s)
        for ratio in RATIOS
        if ratio.of in measured and ratio.against in measured
    ]


def markdown(bench: Bench) -> str:
    """The tables: throughput and times, ratios, families, facts of each peer."""
    measured, machine = bench.figures(), bench.machine
    limits = f"{machine.gemm_gflop_per_s:.0f} GFLOP/s, {machine.read_gb_per_s:.1f} GB/s"
    ratio_rows = [[title, f"{value:.2f}"] for title, value in ratios(measured)]
    fact_rows = [
        [bench.peers[peer], name, f"{value:,.1f}"]
        for peer, facts in bench.facts.items()
        for name, value in _medians(facts).items()
    ]
    target_rows = [[one.target.title, one.target.to_reach(), one.shown, one.verdict] for one in outcomes(bench)]
    skipped = [f"* {peer} was skipped: {reason}" for peer, reason in bench.skipped.items()]
    failed = [f"* {name} broke: {' '.join(reason.split())}" for name, reason in bench.failed.items()]
    parts = [
        "# Bench",
        f"{machine.cpu}, {machine.num_threads} threads of {machine.num_cpus} CPUs; "
        f"{limits} (fp32, at the start; a workload's limit is by those right before it); "
        f"load before: {machine.load_before:.2f}. "
        f"Base {bench.base}, our precision {bench.precision}. "
        f"Medians over the repeats; times in ms as {' / '.join(TABLE_PERCENTILES)}; "
        "MiB of memory after the workload, shared pages counted once; "
        "stall: how long adapters held steps up, where that was longer than 2 ms, all in all.",
        _table(["figure", "to reach", "measured", "reached"], target_rows),
        _table(
            ["workload", "peer", "output tok/s", "of the limit", "TTFT", "inter-token", "latency", "MiB", "stall ms"],
            [_row(bench, *key, one) for key, one in sorted(measured.items(), key=lambda item: item[0][1])],
        ),
        _table(["ratio of output tokens/s", ""], ratio_rows),
        *_families(bench.families),
        _churn(bench.churn),
        _table(["peer", "fact", ""], fact_rows),
        "\n".join([*skipped, *failed]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(bench: Bench, peer: str, workload: str, one: Figures) -> list[str]:
    spreads = [one.ttft_ms, one.inter_token_ms, one.latency_ms]
    return [
        f"{workload}: {bench.titles[workload]}",
        bench.peers[peer],
        f"{one.output_tokens_per_s:.1f}",
        "-" if one.of_limit is None else f"{one.of_limit:.0%}",
        *(" / ".join(f"{spread[p]:,.0f}" for p in TABLE_PERCENTILES) if spread else "-" for spread in spreads),
        "-" if one.memory_mib is None else f"{one.memory_mib:,.0f}",
        f"{1e3 * one.counted['stall_seconds']:,.0f}" if "stall_seconds" in one.counted else "-",
    ]


def _churn(churn: Churn) -> str:
    """What was measured of adapters that come and go."""
    values = [(name.replace("_", " "), getattr(churn, name)) for name in Churn.__struct_fields__]
    return _table(["adapters that come and go", ""], [[name, f"{value:,.1f}"] for name, value in values if value])


def _families(families: Families) -> list[str]:
    """The tables of the methods and of soft prompts, each below what it is of."""
    rates = families.rates(BASE)
    base = f"; the base's own {len(rates)} batches {min(rates):.1f} to {max(rates):.1f} tok/s" if rates else ""
    said = (
        f"{families.num_requests} requests at once, each with an adapter of its own, prompts of {families.num_prompt} "
        f"tokens, {families.num_tokens} new ones; output tok/s while all of them decode, as the share of the base's "
        f"around it{base}."
    )
    shares, waits = _shares(families), _waits(families)
    return [*([said, shares] if shares else []), *(["One request at a time.", waits] if waits else [])]


def _shares(families: Families) -> str:
    rows = [
        [
            method,
            str(families.worn[method].num_different),
            f"{families.worn[method].slot_bytes / 2**20:.1f}",
            f"{statistics.median(families.rates(method)):.1f}",
            f"{statistics.median(shares):.0%}",
            f"{min(shares):.0%} to {max(shares):.0%}",
        ]
        for method, shares in families.shares().items()
    ]
    return _table(["method", "different adapters", "MiB of each", "output tok/s", "of the base", "each time"], rows)


def _waits(families: Families) -> str:
    rows = [
        [
            wait.method,
            str(wait.num_virtual),
            str(wait.num_prompt),
            f"{statistics.median(wait.without_ms):.1f}",
            f"{statistics.median(wait.with_ms):.1f}",
            f"{wait.ratio:.2f}",
        ]
        for wait in families.waits
    ]
    head = ["soft prompt, after its first use", "virtual tokens", "prompt", "TTFT without, ms", "TTFT with", "ratio"]
    return _table(head, rows)


def _summary(families: Families) -> dict[str, Any]:
    return {
        "of_the_base": {method: statistics.median(shares) for method, shares in families.shares().items()},
        "soft_prompt_ttft_ratio": {f"{wait.method} {wait.num_prompt}": wait.ratio for wait in families.waits},
    }


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _medians(facts: list[dict[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for one in facts for name in one)
    return {name: statistics.median(one[name] for one in facts if name in one) for name in names}
