"""The peers, on a tiny base."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.benchmarks.peers import Setup, all_peers, vllm
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


@pytest.mark.parametrize("num_adapters", [2, 40])
def test_vllm_serves_every_adapter(num_adapters: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its server's own module is run on all threads, with each adapter as the model of its number, all of them in host
    memory, as many in a batch as requests, and no beginnings shared, as nobody has any there."""
    asked: list[tuple[list[str], dict[str, str]]] = []

    @contextmanager
    def never(
        command: list[str], _log: Path, _port: int, environment: dict[str, str]
    ) -> Iterator[tuple[str, None, float]]:
        asked.append((command, environment))
        yield "http://nowhere", None, 1.0

    monkeypatch.setattr(vllm, "running", never)
    adapters = [tmp_path / f"adapter-{number}" for number in range(num_adapters)]
    with vllm.Vllm().start(Setup(tmp_path / "base", adapters, tmp_path, 2, "auto", tmp_path)) as session:
        assert session.facts == {"start_to_ready_s": 1.0}
    ((words, environment),) = asked
    assert environment["OMP_NUM_THREADS"] == "2" and environment["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert words[1:5] == ["-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "base")]
    modules = words[words.index("--lora-modules") + 1 :]
    assert modules == [f"{number}={folder}" for number, folder in enumerate(adapters)]
    said = {flag: words[words.index(flag) + 1] for flag in ("--max-loras", "--max-cpu-loras", "--max-num-seqs")}
    assert said == {"--max-loras": "16", "--max-cpu-loras": str(max(num_adapters, 16)), "--max-num-seqs": "16"}
    assert "--no-enable-prefix-caching" in words


def test_a_worker_that_dies_says_why(tmp_path: Path) -> None:
    """A worker that ends before its answer is an error with the end of its log."""
    command = [sys.executable, "-c", "import sys; input(); sys.exit('no such base')"]
    with worker(command, tmp_path / "log", 1) as process, pytest.raises(WorkerError, match="no such base"):
        process.ask({})
