"""The whole bench, small: real server processes and PEFT, on a tiny base."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import __main__ as bench
from tests.benchmarks import workload
from tests.benchmarks.peers.manyhats import COUNTERS

SPREAD = {"mean", "p50", "p95", "p99"}
PEERS = ["manyhats", "manyhats-uncached", "peft", "vllm"]


def test_a_bench_from_its_command_to_its_files(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Closed loops, a prefix and open loops are asked of the server over HTTP and of PEFT in one run, each answer in
    full; every figure has its spread, and a peer that is not installed is skipped with a word."""
    words = ["--only", "W1", "W4", "W5", "W7", "--num-requests", "3", "--repeats", "1", "--num-threads", "1"]
    words += ["--base", str(tiny_base), "--out", str(tmp_path / "out"), "--peers", *PEERS]
    monkeypatch.setattr(sys, "argv", ["bench", *words])
    monkeypatch.setattr("tests.benchmarks.peers.vllm.PYTHON", tmp_path / "nowhere")
    monkeypatch.setattr(workload, "read", _with_few_adapters)
    bench.main()
    found = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert found["bench"]["failed"] == {}
    assert found["bench"]["skipped"] == {"vllm": "not installed; `make peer-vllm` installs it"}
    assert min(found["bench"]["machine"][name] for name in ("gemm_gflop_per_s", "read_gb_per_s")) > 0
    figures: dict[str, Any] = found["summary"]["figures"]
    mine = ["W1", "W3", "W4", "W5", "W7-0.5", "W7-0.8", "W7-1.2"]
    asked = [*(f"manyhats {name}" for name in mine), "manyhats-uncached W5", "peft W1", "peft W3", "peft W4"]
    assert sorted(figures) == sorted(asked)
    for name, one in figures.items():
        assert one["output_tokens_per_s"] > 0 and one["memory_mib"] > 0 and set(one["latency_ms"]) == SPREAD
        if not name.startswith("peft"):
            assert set(one["ttft_ms"]) == set(one["inter_token_ms"]) == SPREAD and set(one["counted"]) == {*COUNTERS}
    limits = {one["workload"]: one["limit_per_s"] for one in found["bench"]["runs"]}
    assert {name for name, limit in limits.items() if limit} == {"W1", "W3", "W4", "W5"}
    assert figures["manyhats W5"]["counted"]["cache_query_tokens"] == 3 * 544
    assert figures["manyhats-uncached W5"]["counted"]["cache_hit_tokens"] == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"bench.json", "bench.md", "bench.png"}


READ = workload.read


def _with_few_adapters(name: str, num_requests: int | None = None) -> workload.Workload:
    """A committed workload, but for the number of its adapters, whose making and proving takes most of the time."""
    one = READ(name, num_requests)
    worn = sorted({request.adapter for request in one.requests if request.adapter is not None})
    for request in one.requests:
        request.adapter = None if request.adapter is None else worn.index(request.adapter)
    one.num_adapters, one.prefixes = 3, [one.prefixes[number] for number in worn] if one.prefixes else []
    return one
