"""Our own server, as users have it: `manyhats serve` in processes of its own, over HTTP."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.benchmarks.load import ask_all
from tests.benchmarks.peers import ME, Setup
from tests.benchmarks.results import Run
from tests.benchmarks.workload import Prompted, Workload
from tests.kit.adapters import zip_folder
from tests.kit.server import Server, serve

MIB = 2**20
NUM_WARM_UP = 8


def task_of(adapter: int) -> str:
    """The task that an adapter is uploaded as."""
    return f"bench-{adapter}"


class Manyhats:
    """The peer that all others are held against."""

    title = "manyhats"

    def missing(self) -> str | None:
        """It is always here."""
        return None

    @contextmanager
    def start(self, setup: Setup) -> Iterator[ManyhatsSession]:
        """Serve from an empty data directory, upload every adapter, and warm up."""
        data = setup.scratch / "data"
        with serve(setup.base, data, precision=setup.precision, num_threads=setup.num_threads) as server:
            yield ManyhatsSession(server, setup)


class ManyhatsSession:
    """A server that is up and has all adapters."""

    def __init__(self, server: Server, setup: Setup) -> None:
        self.server = server
        base_bytes = sum(path.stat().st_size for path in setup.base.glob("*.safetensors"))
        self.facts = {"start_to_ready_s": server.startup_seconds, "base_weights_mib": base_bytes / MIB}
        self._note_memory("at_start")
        self.facts["upload_ms"] = 1e3 * statistics.median(self._upload(setup))
        self._warm_up(setup)

    def run(self, workload: Workload, requests: list[Prompted], on_done: Callable[[], None]) -> Run:
        """See `Session.run`."""
        seconds, timings = ask_all(self.server.url, requests, workload.concurrency, task_of, on_done)
        self._note_memory(f"after_{workload.name}")
        return Run(ME, workload.name, seconds, timings)

    def _upload(self, setup: Setup) -> Iterator[float]:
        for number, folder in enumerate(setup.adapters):
            body, began = zip_folder(folder), time.perf_counter()
            self.server.upload(task_of(number), body)
            yield time.perf_counter() - began

    def _warm_up(self, setup: Setup) -> None:
        """A few long answers of the base, then one token of every adapter, which brings it into its slot.

        An adapter's memory is what is grown by then, less what as many requests to the base made it grow.
        """
        ask_all(self.server.url, [Prompted(None, [1] * 64, 16)] * NUM_WARM_UP, NUM_WARM_UP, task_of, lambda: None)
        grown = []
        for adapters in ([None] * len(setup.adapters), range(len(setup.adapters))):
            before = self.server.memory()["pss"]
            requests = [Prompted(adapter, [2, number, 3], 1) for number, adapter in enumerate(adapters)]
            ask_all(self.server.url, requests, 1, task_of, lambda: None)
            grown.append(self.server.memory()["pss"] - before)
        self.facts["memory_per_adapter_mib"] = (grown[1] - grown[0]) / len(setup.adapters) / MIB

    def _note_memory(self, when: str) -> None:
        for kind, num_bytes in self.server.memory().items():
            self.facts[f"{kind}_{when}_mib"] = num_bytes / MIB
