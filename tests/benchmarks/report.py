"""What came out of a bench: bench.json (everything), bench.md (tables), bench.png (a plot)."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import NamedTuple

import msgspec

from tests.benchmarks.machine import Machine
from tests.benchmarks.peers import ME
from tests.benchmarks.results import PERCENTILES, Figures, Run, figures

TABLE_PERCENTILES = [f"p{percentile}" for percentile in PERCENTILES]


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
]


class Bench(msgspec.Struct):
    """One run of the bench. `facts[peer]` has one entry a repeat; `skipped` peers have their reason."""

    machine: Machine
    base: str
    precision: str
    titles: dict[str, str]  # of the workloads
    limits: dict[str, float]  # output tokens/s that the machine could reach, by workload
    peers: dict[str, str]  # their titles
    runs: list[Run] = []
    facts: dict[str, list[dict[str, float]]] = {}
    skipped: dict[str, str] = {}

    def figures(self) -> dict[tuple[str, str], Figures]:
        """Medians by (peer, workload)."""
        keys = dict.fromkeys((run.peer, run.workload) for run in self.runs)
        return {key: figures([run for run in self.runs if (run.peer, run.workload) == key]) for key in keys}


def write(bench: Bench, folder: Path) -> None:
    """Write the three files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = bench.figures()
    summary = {
        "figures": {f"{peer} {workload}": one for (peer, workload), one in measured.items()},
        "ratios": dict(ratios(measured)),
        "facts": {peer: _medians(facts) for peer, facts in bench.facts.items()},
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
    """The tables: throughput and times, ratios, facts of each peer."""
    measured, machine = bench.figures(), bench.machine
    limits = f"{machine.gemm_gflop_per_s:.0f} GFLOP/s, {machine.read_gb_per_s:.1f} GB/s"
    ratio_rows = [[title, f"{value:.2f}"] for title, value in ratios(measured)]
    fact_rows = [
        [bench.peers[peer], name, f"{value:,.1f}"]
        for peer, facts in bench.facts.items()
        for name, value in _medians(facts).items()
    ]
    skipped = [f"* {peer} was skipped: {reason}" for peer, reason in bench.skipped.items()]
    parts = [
        "# Bench",
        f"{machine.cpu}, {machine.num_threads} threads of {machine.num_cpus} CPUs; "
        f"{limits} (fp32, of this run); load before: {machine.load_before:.2f}. "
        f"Base {bench.base}, our precision {bench.precision}. "
        f"Medians over the repeats; times in ms as {' / '.join(TABLE_PERCENTILES)}.",
        _table(
            ["workload", "peer", "output tok/s", "of the limit", "TTFT", "inter-token", "latency"],
            [_row(bench, *key, one) for key, one in sorted(measured.items(), key=lambda item: item[0][1])],
        ),
        _table(["ratio of output tokens/s", ""], ratio_rows),
        _table(["peer", "fact", ""], fact_rows),
        "\n".join(skipped),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _row(bench: Bench, peer: str, workload: str, one: Figures) -> list[str]:
    spreads = [one.ttft_ms, one.inter_token_ms, one.latency_ms]
    return [
        f"{workload}: {bench.titles[workload]}",
        bench.peers[peer],
        f"{one.output_tokens_per_s:.1f}",
        f"{one.output_tokens_per_s / bench.limits[workload]:.0%}",
        *(" / ".join(f"{spread[p]:,.0f}" for p in TABLE_PERCENTILES) if spread else "-" for spread in spreads),
    ]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) if rows else ""


def _medians(facts: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in facts if name in one) for name in facts[0]}


def plot(bench: Bench, path: Path) -> None:
    """Bars of output tokens/s by workload and peer, and the latency of our own server."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    measured = bench.figures()
    workloads = sorted({workload for _, workload in measured})
    shown = list(dict.fromkeys(peer for peer, _ in measured))
    figure, (speed, times) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    width = 0.8 / len(shown)
    for place, peer in enumerate(shown):
        heights = [measured[peer, w].output_tokens_per_s if (peer, w) in measured else 0.0 for w in workloads]
        where = [index + (place - (len(shown) - 1) / 2) * width for index in range(len(workloads))]
        speed.bar_label(speed.bar(where, heights, width, label=bench.peers[peer]), fmt="%.0f", fontsize=8)
    speed.set(title="output tokens/s", xticks=range(len(workloads)), xticklabels=workloads)
    speed.legend(fontsize=8)
    runs = [run for run in bench.runs if run.peer == ME]
    for workload in sorted({run.workload for run in runs}):
        waits = sorted(t.first - t.started for run in runs if run.workload == workload for t in run.timings if t.first)
        times.plot(waits, [(rank + 1) / len(waits) for rank in range(len(waits))], label=workload)
    times.set(title="time to first token, manyhats", xlabel="s", ylabel="share of requests")
    times.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)
