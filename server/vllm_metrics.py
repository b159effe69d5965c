"""Metrics under vLLM's names, by which gateways (the Gateway API's inference extension, for one) route requests.

They are of the server as a whole. Their label `model_name` is always `base`; adapters are told by their tasks' names,
as requests name them, whichever tenant's they are.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import Stats
from server.schemas import BASE

TTFT_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
MODEL = ["model_name"]


class AdaptersInUse(NamedTuple):
    """A request that runs or waits: the tasks whose adapters it uses, and whether it has a token yet."""

    tasks: Sequence[str]
    has_begun: Callable[[], bool]


class VllmMetrics(Collector):
    """The gauges, read when they are asked for, and the histograms; at most `max_running` adapters are in a batch."""

    def __init__(self, registry: CollectorRegistry, stats: Callable[[], Stats], max_running: int) -> None:
        self._stats, self._max_running = stats, max_running
        self._in_flight: dict[int, AdaptersInUse] = {}
        self.ttft = self._histogram(registry, "time_to_first_token", "From arrival to the first token", TTFT_SECONDS)
        self.gap = self._histogram(registry, "time_per_output_token", "Between two tokens", TOKEN_SECONDS)
        registry.register(self)

    def _histogram(self, registry: CollectorRegistry, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"vllm:{name}_seconds", text, MODEL, buckets=buckets, registry=registry).labels(BASE)

    @contextmanager
    def in_flight(self, tasks: Sequence[str], has_begun: Callable[[], bool]) -> Iterator[None]:
        """Let the tasks' adapters be told as waiting, as running once the request has begun, while the block runs."""
        request = AdaptersInUse(tasks, has_begun)
        self._in_flight[id(request)] = request
        try:
            yield
        finally:
            del self._in_flight[id(request)]

    def collect(self) -> Iterator[Metric]:
        """The engine's queue and cache, and the adapters that are in use; the value of the latter is the time."""
        stats = self._stats()
        yield _gauge("num_requests_running", "Sequences in the batch", stats.num_running)
        yield _gauge("num_requests_waiting", "Sequences in the queue", stats.num_waiting)
        used = stats.num_blocks_used / stats.num_blocks if stats.num_blocks else 0.0
        yield _gauge("kv_cache_usage_perc", "Share of the KV cache that is in use, 0 to 1", used)
        labels = ["running_lora_adapters", "waiting_lora_adapters", "max_lora"]
        info = GaugeMetricFamily("vllm:lora_requests_info", "The adapters in use; the value is the time", labels=labels)
        info.add_metric([self._names(True), self._names(False), str(self._max_running)], time.time())
        yield info

    def _names(self, has_begun: bool) -> str:
        found = [request.tasks for request in self._in_flight.values() if request.has_begun() == has_begun]
        return ",".join(sorted({task for tasks in found for task in tasks}))


def _gauge(name: str, text: str, value: float) -> Metric:
    family = GaugeMetricFamily(f"vllm:{name}", text, labels=MODEL)
    family.add_metric([BASE], value)
    return family
