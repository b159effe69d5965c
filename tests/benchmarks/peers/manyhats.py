"""Our own server, as users have it: `manyhats serve` in processes of its own, over HTTP."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import httpx2
from safetensors import safe_open

from tests.benchmarks.load import ask_all, ask_on_time
from tests.benchmarks.make_workloads import LOADS
from tests.benchmarks.peers import ME, UNCACHED, Setup
from tests.benchmarks.results import Run
from tests.benchmarks.workload import Prompted, Workload
from tests.kit.adapters import zip_folder
from tests.kit.server import Server, serve

MIB = 2**20
NUM_WARM_UP = 8
CAPACITY_OF = "W3"  # whose requests/s an open loop's load is a share of
COUNTERS = ("stall_seconds", "evictions", "loads", "preemptions", "cache_hit_tokens", "cache_query_tokens")
BYTES = {"fp32": 4, "int8": 1}  # of a weight; 2 otherwise


def read_counters(text: str) -> dict[str, float]:
    """The engine's counters of `COUNTERS` from Prometheus's text format. Raises `KeyError` for one that lacks."""
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(lines[f"manyhats_engine_{name}_total"]) for name in COUNTERS}


def weight_bytes(base: Path, precision: str) -> int:
    """What the base's weights take at least, at the precision that they are kept in."""
    num_bytes = 0
    for path in base.glob("*.safetensors"):
        with safe_open(path, "numpy") as file:
            num_bytes += sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    return num_bytes * BYTES.get(precision, 2)


def task_of(adapter: int) -> str:
    """The task that an adapter is uploaded as."""
    return f"bench-{adapter}"


class Manyhats:
    """The peer that all others are held against."""

    title = "manyhats"
    workloads: tuple[str, ...] = ("W1", "W3", "W3-uniform", "W4", "W5", "W6", *(f"W7-{load}" for load in LOADS))
    once: tuple[str, ...] = ("W2",)
    name, environment = ME, dict[str, str]()

    def missing(self) -> str | None:
        """It is always here."""
        return None

    @contextmanager
    def start(self, setup: Setup) -> Iterator[ManyhatsSession]:
        """Serve from an empty data directory, upload every adapter, and warm up."""
        data = setup.scratch / "data"
        with (
            patch.dict(os.environ, self.environment),
            serve(setup.base, data, precision=setup.precision, num_threads=setup.num_threads) as server,
        ):
            yield ManyhatsSession(server, setup, self.name)


class Uncached(Manyhats):
    """What W5 is without shared beginnings."""

    title = "manyhats, prefix cache off"
    workloads, once = ("W5",), ()
    name, environment = UNCACHED, {"MANYHATS_PREFIX_CACHE": "false"}  # its flag takes no value


class ManyhatsSession:
    """A server that is up and has the adapters of the workloads that it was asked so far."""

    def __init__(self, server: Server, setup: Setup, name: str = ME) -> None:
        self.server, self.setup, self.name = server, setup, name
        self.num_uploaded = 0
        self.capacity: float | None = None
        base_bytes = weight_bytes(setup.base, setup.precision)
        self.facts = {"start_to_ready_s": server.startup_seconds, "base_weights_mib": base_bytes / MIB}
        self._note_memory("at_start")
        self.facts["memory_above_base_at_start_mib"] = self.facts["pss_at_start_mib"] - self.facts["base_weights_mib"]

    def run(self, workload: Workload, requests: list[Prompted], on_done: Callable[[], None]) -> Run:
        """See `Session.run`. An open loop's pace is of this session's W3, which must have run before."""
        self._dress(workload.num_adapters)
        before = self._counters()
        if workload.load is None:
            offered = None
            seconds, timings = ask_all(self.server.url, requests, workload.concurrency, task_of, on_done)
        else:
            offered = workload.load * self._capacity()
            arrivals = [arrival / offered for arrival in workload.arrivals[: len(requests)]]
            seconds, timings = ask_on_time(self.server.url, requests, arrivals, task_of, on_done)
        if workload.name == CAPACITY_OF:
            self.capacity = len(requests) / seconds
        counted = {name: value - before[name] for name, value in self._counters().items()}
        memory = self.server.memory()["pss"] / MIB
        return Run(self.name, workload.name, seconds, timings, memory, counted, offered)

    def _capacity(self) -> float:
        if self.capacity is None:
            raise RuntimeError(f"an open loop's pace is a share of {CAPACITY_OF}'s speed, which was not measured")
        return self.capacity

    def _counters(self) -> dict[str, float]:
        answer = httpx2.get(f"{self.server.url}/metrics", timeout=30).raise_for_status()
        return read_counters(answer.text)

    def _dress(self, num: int) -> None:
        """Upload the adapters up to number `num`, and ask each for a token, which brings it into its slot."""
        first, self.num_uploaded = self.num_uploaded, max(num, self.num_uploaded)
        numbers = range(first, self.num_uploaded)
        if not numbers:
            return
        times = list(self._upload(numbers))
        if first == 0:
            self.facts["upload_ms"] = 1e3 * statistics.median(times)
            self._warm_up(numbers)
        else:
            ask_all(self.server.url, [Prompted(one, [2, one, 3], 1) for one in numbers], 1, task_of, lambda: None)

    def _upload(self, numbers: range) -> Iterator[float]:
        for number in numbers:
            body, began = zip_folder(self.setup.adapters[number]), time.perf_counter()
            self.server.upload(task_of(number), body)
            yield time.perf_counter() - began

    def _warm_up(self, numbers: range) -> None:
        """A few long answers of the base, then one token of every adapter, which brings it into its slot.

        An adapter's memory is what is grown by then, less what as many requests to the base made it grow.
        """
        ask_all(self.server.url, [Prompted(None, [1] * 64, 16)] * NUM_WARM_UP, NUM_WARM_UP, task_of, lambda: None)
        grown = []
        for adapters in ([None] * len(numbers), numbers):
            before = self.server.memory()["pss"]
            requests = [Prompted(adapter, [2, number, 3], 1) for number, adapter in enumerate(adapters)]
            ask_all(self.server.url, requests, 1, task_of, lambda: None)
            grown.append(self.server.memory()["pss"] - before)
        self.facts["memory_per_adapter_mib"] = (grown[1] - grown[0]) / len(numbers) / MIB

    def _note_memory(self, when: str) -> None:
        for kind, num_bytes in self.server.memory().items():
            self.facts[f"{kind}_{when}_mib"] = num_bytes / MIB
