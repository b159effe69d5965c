"""The figures and the files that come out of a bench."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import report
from tests.benchmarks.bench import Bench
from tests.benchmarks.machine import Machine, count_weights, limit_tokens_per_s
from tests.benchmarks.plot import figure_of
from tests.benchmarks.results import Run, Timing, figures
from tests.benchmarks.shares import Decode, Families, Wait, Worn
from tests.benchmarks.workload import Request, Workload

MACHINE = Machine("a CPU", 2, 2, 0.1, 100.0, 10.0, {})


def run(peer: str, workload: str, seconds: float, first: float | None = 0.5) -> Run:
    """Two requests of 10 tokens each."""
    gaps = [0.1, 0.2] if first else []
    timings = [Timing(5, 10, 0.0, seconds, first, gaps), Timing(5, 10, 0.0, 1.0, first, gaps)]
    return Run(peer, workload, seconds, timings, limit_per_s=100.0)


def test_figures_are_medians_over_runs() -> None:
    """Output tokens/s, and every percentile, are the medians over the repeats."""
    one = figures([run("manyhats", "W3", 2.0), run("manyhats", "W3", 4.0), run("manyhats", "W3", 8.0)])
    assert one.output_tokens_per_s == 5.0
    assert one.total_tokens_per_s == 7.5
    assert one.ttft_ms["p95"] == 500.0
    assert one.inter_token_ms["mean"] == pytest.approx(150.0)
    assert one.latency_ms["p50"] == 2500.0


def test_every_workload_is_reported_with_its_spread(tmp_path: Path) -> None:
    """Mean, p50, p95 and p99 of first tokens, of gaps and of latencies, memory, stall and the share of the machine's
    limit are in the tables and in the JSON."""
    timings = [Timing(5, 10, 0.0, 0.3 * n, 0.1 * n, [0.001 * n]) for n in range(1, 101)]
    counted = {"stall_seconds": 0.25}
    runs = [Run("manyhats", "W3", 20.0, timings, 1234.0, counted, None, 100.0), run("peft", "W3", 40.0, first=None)]
    titles, peers = {"W3": "mixed"}, {"manyhats": "manyhats", "peft": "PEFT"}
    report.write(Bench(MACHINE, "smollm2-135m", "auto", titles, peers, runs), tmp_path)
    spreads = "5,050 / 5,050 / 9,505 / 9,901 | 50 / 50 / 95 / 99 | 15,150 / 15,150 / 28,515 / 29,703"
    text = (tmp_path / "bench.md").read_text()
    assert "times in ms as mean / p50 / p95 / p99" in text and "100 GFLOP/s, 10.0 GB/s" in text
    assert f"| W3: mixed | manyhats | 50.0 | 50% | {spreads} | 1,234 | 250 |" in text
    assert "| W3: mixed | PEFT | 0.5 | 0% | - | - | 20,500 / 20,500 / 38,050 / 39,610 | - | - |" in text
    one = json.loads((tmp_path / "bench.json").read_text())["summary"]["figures"]["manyhats W3"]
    assert one["ttft_ms"] == pytest.approx({"mean": 5050, "p50": 5050, "p95": 9505, "p99": 9901})
    assert one["inter_token_ms"] == pytest.approx({"mean": 50.5, "p50": 50.5, "p95": 95.05, "p99": 99.01})
    assert one["latency_ms"] == pytest.approx({"mean": 15150, "p50": 15150, "p95": 28515, "p99": 29703})
    assert (one["output_tokens_per_s"], one["memory_mib"], one["counted"]) == (50.0, 1234.0, counted)


def test_the_files_hold_ratios_and_skipped_peers(tmp_path: Path) -> None:
    """The three files are written; ratios are of what was measured; a skipped peer is named with its reason."""
    bench = Bench(
        MACHINE,
        "smollm2-135m",
        "auto",
        {"W3": "mixed", "W4": "base"},
        {"manyhats": "manyhats", "peft": "PEFT", "openvino": "OpenVINO"},
        [run("manyhats", "W3", 2.0), run("manyhats", "W4", 1.0), run("peft", "W3", 8.0, first=None)],
        {"manyhats": [{"start_to_ready_s": 3.0}, {"start_to_ready_s": 5.0}]},
        {"openvino": "not installed"},
    )
    report.write(bench, tmp_path)
    ratios = json.loads((tmp_path / "bench.json").read_text())["summary"]["ratios"]
    assert ratios == {
        "W3 against PEFT's mixed batch of 16": 4.0,
        "W3 / W4 of the same server: what mixing costs": 0.5,
    }
    text = (tmp_path / "bench.md").read_text()
    assert "| W3: mixed | manyhats | 10.0 | 10% |" in text
    assert "| manyhats | start_to_ready_s | 4.0 |" in text
    assert "openvino was skipped: not installed" in text
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_the_families_are_tables_and_a_panel(tmp_path: Path) -> None:
    """A bench of the families alone: shares with their spread, waits with their ratio, and one panel, without runs."""
    bench = Bench(MACHINE, "smollm2-135m", "auto", {}, {})
    rates = [("base", 100.0), ("lora", 90.0), ("base", 100.0), ("lora", 60.0), ("base", 100.0)]
    bench.families = Families(
        16, 32, 64, {"lora": Worn(16, 3 * 2**20)}, [Decode(*one) for one in rates], [Wait("p", 100, 32, [20.0], [21.0])]
    )
    report.write(bench, tmp_path)
    summary = json.loads((tmp_path / "bench.json").read_text())["summary"]["families"]
    assert summary == {"of_the_base": {"lora": 0.75}, "soft_prompt_ttft_ratio": {"p 32": 1.05}}
    text = (tmp_path / "bench.md").read_text()
    assert "| lora | 16 | 3.0 | 75.0 | 75% | 60% to 90% |" in text
    assert "| p | 100 | 32 | 20.0 | 21.0 | 1.05 |" in text
    assert [axes.get_title() for axes in figure_of(bench).axes] == ["decode speed kept, of the base's"]


def test_the_legend_covers_no_bar() -> None:
    """The legend of the throughputs lies apart from every bar, however many peers there are."""
    peers = {f"peer-{number}": f"a peer with a long name, number {number}" for number in range(4)}
    runs = [run(peer, workload, 1.0) for peer in peers for workload in ("W1", "W2", "W3", "W4")]
    figure = figure_of(Bench(MACHINE, "smollm2-135m", "auto", {}, peers, runs))
    figure.draw_without_rendering()
    axes = figure.axes[0]
    legend: Any = axes.get_legend()
    assert not any(legend.get_window_extent().overlaps(bar.get_window_extent()) for bar in axes.patches)


def test_the_limit_counts_products_and_reads(tiny_base: Path) -> None:
    """The limit is the slower of multiplying every token by every weight and reading every weight every step."""
    num_linear, num_head = count_weights(tiny_base)
    assert (num_linear, num_head) == (2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96), 259 * 64)
    one = Workload("W", "", 1, 0, {}, [Request(None, 0, 0, 10)])
    read_bound = 10e9 / (2 * (num_linear + num_head))
    assert limit_tokens_per_s(MACHINE, tiny_base, one) == pytest.approx(read_bound)
    one.concurrency = 1000
    assert limit_tokens_per_s(MACHINE, tiny_base, one) == pytest.approx(100e9 / (2 * (num_linear + num_head)))
