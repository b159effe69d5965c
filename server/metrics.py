"""What Prometheus sees: requests and tokens by task, times, and the engine's own state.

Label values come from resolved tasks alone, and from at most `MAX_TASKS` of them (the rest are `_other`), so that no
request can make a series.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psutil
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.engine.messages import Stats

MAX_TASKS = 200
OTHER = "_other"  # no task can be named so
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120)
GAP_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4, 0.8, 1.5, 3, 6)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self, stats: Callable[[], Stats], engine_pid: Callable[[], int | None]) -> None:
        self.registry = CollectorRegistry()
        self._tasks: set[str] = set()
        labels = ["task"]
        self.requests = self._counter("requests", "Requests ended, by status", [*labels, "status"])
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts", labels)
        self.completion_tokens = self._counter("completion_tokens", "Tokens of answers", labels)
        self.cached_tokens = self._counter("cached_prompt_tokens", "Prompt tokens whose KV was shared", labels)
        self.latency = self._histogram("request_seconds", "From arrival to the end of the answer", SECONDS)
        self.ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token", SECONDS)
        self.gap = self._histogram("inter_token_seconds", "Between two tokens of a sequence", GAP_SECONDS)
        self.queued = self._histogram("queue_seconds", "Waiting to run, loading excluded", SECONDS)
        self.load = self._histogram("adapter_wait_seconds", "Waiting for an adapter to load", SECONDS)
        self.uploads = self._counter("uploads", "Uploads, by status", ["status"])
        self.responses = self._counter("http_responses", "All answers, refusals too, by route", ["route", "status"])
        self.registry.register(EngineCollector(stats, engine_pid))

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        return Counter(f"manyhats_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"manyhats_{name}", text, ["task"], buckets=buckets, registry=self.registry)

    def label(self, task: str) -> str:
        """The label value of a resolved task."""
        if task not in self._tasks and len(self._tasks) >= MAX_TASKS:
            return OTHER
        self._tasks.add(task)
        return task

    def render(self) -> bytes:
        """Prometheus's text format."""
        return generate_latest(self.registry)


class EngineCollector(Collector):
    """The engine's gauges and counters, read when they are asked for."""

    def __init__(self, stats: Callable[[], Stats], engine_pid: Callable[[], int | None]) -> None:
        self._stats, self._engine_pid = stats, engine_pid

    def collect(self) -> Iterator[Metric]:
        """Every field of `Stats`: `*_total` are counters, the others gauges; and the processes' memory."""
        stats = self._stats()
        for name in Stats.__struct_fields__:
            value = getattr(stats, name)
            if name.endswith("_total"):
                yield CounterMetricFamily(f"manyhats_engine_{name.removesuffix('_total')}", _say(name), value=value)
            else:
                yield GaugeMetricFamily(f"manyhats_engine_{name}", _say(name), value=value)
        memory = GaugeMetricFamily("manyhats_resident_bytes", "Resident memory of a process", labels=["process"])
        for process, pid in (("front", None), ("engine", self._engine_pid())):
            if process == "front" or pid is not None:
                memory.add_metric([process], _resident(pid))
        yield memory


def _say(name: str) -> str:
    return f"The engine's {name.replace('_', ' ')}"


def _resident(pid: int | None) -> float:
    try:
        return float(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0.0
