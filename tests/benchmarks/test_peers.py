"""The peers, on a tiny base."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.benchmarks.peers import Setup, all_peers
from tests.benchmarks.peers.peft import Peft
from tests.benchmarks.peers.worker import WorkerError, worker
from tests.benchmarks.workload import Prompted, Workload
from tests.kit.adapters import make_lora

MAKEFILE = Path(__file__).parents[2] / "Makefile"


def test_peft_answers_mixed_batches_in_full(tiny_base: Path, tmp_path: Path) -> None:
    """The PEFT peer answers a mixed batch, a batch of one adapter and one of the base, and reports each request."""
    adapters = [make_lora(tmp_path / str(seed), tiny_base, seed=seed) for seed in range(2)]
    one = Workload("W3", "", 2, 2, {}, [])
    requests = [
        Prompted(wears, [5, 6, 7][: 1 + index % 3], 2 + index) for index, wears in enumerate([0, 1, 1, 1, None])
    ]
    done: list[None] = []
    with Peft().start(Setup(tiny_base, adapters, tmp_path, 1, "auto", tmp_path)) as session:
        run = session.run(one, requests, lambda: done.append(None))
    assert len(done) == len(run.timings) == 5
    assert sorted(timing.num_tokens for timing in run.timings) == [2, 3, 4, 5, 6]
    assert session.facts["pss_mib"] > 0


def test_a_peer_that_is_not_installed_says_by_which_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no peer was installed, ours and PEFT are here, and each other one names the command of the Makefile."""
    monkeypatch.chdir(tmp_path)
    missing = {name: peer.missing() for name, peer in all_peers().items()}
    assert [name for name, reason in missing.items() if reason is None] == ["manyhats", "manyhats-uncached", "peft"]
    for name in ("openvino", "llama", "vllm"):
        assert f"`make peer-{name}`" in str(missing[name])
        assert f"\npeer-{name}:" in MAKEFILE.read_text()


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    """A worker that ends before its answer is an error with the end of its log."""
    command = [sys.executable, "-c", "import sys; input(); sys.exit('no such base')"]
    with worker(command, tmp_path / "log", 1) as process, pytest.raises(WorkerError, match="no such base"):
        process.ask({})
