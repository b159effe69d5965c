"""OpenVINO GenAI's continuous batching, 16-bit weights, in process: `make peer-openvino` installs it.

It cannot mix adapters: requests of several in one batch all get one of them, in silence. So it gets windows of 16
requests, grouped by adapter; the groups of a window run one after the other, and the next window when all are done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from tests.benchmarks.peers import ENVIRONMENTS, Setup
from tests.benchmarks.peers.process import run_once
from tests.benchmarks.peers.worker import Worker, worker
from tests.benchmarks.results import Run, Timing
from tests.benchmarks.workload import Prompted, Workload

PYTHON = ENVIRONMENTS / "openvino" / "bin" / "python"
SCRIPT = Path(__file__).parent / "in_openvino.py"  # runs there, where nothing of ours is installed


class OpenVino:
    """See the module."""

    title = "OpenVINO GenAI, fp16 weights, fp32 arithmetic, grouped by adapter"
    workloads, once = ("W1", "W3", "W4"), ("W2",)

    def missing(self) -> str | None:
        """Whether its environment is there."""
        return None if PYTHON.is_file() else "not installed; `make peer-openvino` installs it"

    @contextmanager
    def start(self, setup: Setup) -> Iterator[OpenVinoSession]:
        """Export the base where that is not done yet, and start a process; it loads when it is first asked."""
        exported = export(setup)
        with worker([str(PYTHON), "-I", str(SCRIPT)], setup.scratch / "openvino.log", setup.num_threads) as process:
            adapters = [{"file": str(one / "adapter_model.safetensors"), "scale": scale(one)} for one in setup.adapters]
            job = {"model": str(exported), "adapters": adapters, "num_threads": setup.num_threads}
            yield OpenVinoSession(process, process.ask(job))


def export(setup: Setup) -> Path:
    """The base in OpenVINO's form; about a minute, once."""
    folder = setup.shared / "openvino"
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        words = ["export", "openvino", "-m", str(setup.base), "--task", "text-generation-with-past"]
        command = [str(PYTHON.with_name("optimum-cli")), *words, "--weight-format", "fp16", str(unfinished)]
        run_once(command, setup.shared / "openvino-export.log")
        unfinished.rename(folder)
    return folder


def scale(adapter: Path) -> float:
    """What OpenVINO calls alpha: alpha / r, for it reads no config."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    return float(config["lora_alpha"] / config["r"])


class OpenVinoSession:
    """A process that has OpenVINO."""

    def __init__(self, process: Worker, facts: dict[str, float]) -> None:
        self._process, self.facts = process, facts

    def run(self, workload: Workload, requests: list[Prompted], on_done: Callable[[], None]) -> Run:
        """See `Session.run`."""
        result = self._process.ask(
            {"concurrency": workload.concurrency, "requests": msgspec.to_builtins(requests)}, on_done
        )
        timings = msgspec.convert(result["timings"], list[Timing])
        return Run("openvino", workload.name, result["seconds"], timings, result["pss_mib"])
