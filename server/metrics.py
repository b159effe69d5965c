"""Metrics for Prometheus: requests and tokens by task and by tenant, times, and the engine's own state.

Label values come from resolved tasks and tenants alone, and from at most `MAX_TASKS` and `MAX_TENANTS` of them (the
rest are `_other`), so that no request can make a series. Versions come without end: the `MAX_VERSIONS` that were used
last have series of their own. What is deleted gives its series back.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.core import ForwardReport, FusedCount
from server.engine.messages import Stats
from server.vllm_metrics import VllmMetrics

MAX_TASKS = 200
MAX_TENANTS = 100
MAX_VERSIONS = 200
OTHER = "_other"  # no task and no tenant can be named so
LABELS = ("tenant", "task", "version")
Labels = tuple[str, ...]  # the values of the first of `LABELS`
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.5, 3, 6, 12, 30, 60, 120)
GAP_SECONDS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.4, 0.8, 1.5, 3, 6)


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(
        self,
        stats: Callable[[], Stats],
        engine_pid: Callable[[], int | None],
        forward: Callable[[], ForwardReport | None] = lambda: None,
        max_running: int = 1,
    ) -> None:
        self.registry = CollectorRegistry()
        self._metrics: list[tuple[Counter | Histogram, frozenset[str]]] = []  # each with its labels
        self._tasks: set[Labels] = set()
        self._tenants: set[Labels] = set()
        self._versions: OrderedDict[tuple[str, str, str], None] = OrderedDict()
        labels, version = ["tenant", "task"], list(LABELS)
        self.requests = self._counter("requests", "Requests ended, by status", [*labels, "status"])
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts", labels)
        self.completion_tokens = self._counter("completion_tokens", "Tokens of answers", labels)
        self.cached_tokens = self._counter("cached_prompt_tokens", "Prompt tokens whose KV was shared", labels)
        self.latency = self._histogram("request_seconds", "From arrival to the end of the answer", SECONDS)
        self.ttft = self._histogram("time_to_first_token_seconds", "From arrival to the first token", SECONDS)
        self.gap = self._histogram("inter_token_seconds", "Between two tokens of a sequence", GAP_SECONDS)
        self.queued = self._histogram("queue_seconds", "Waiting to run, loading excluded", SECONDS)
        self.load = self._histogram("adapter_wait_seconds", "Waiting for an adapter to load", SECONDS)
        self.version_requests = self._counter("version_requests", "Requests ended, by version", [*version, "status"])
        self.version_tokens = self._counter("version_completion_tokens", "Tokens of answers, by version", version)
        self.version_latency = self._histogram("version_request_seconds", "Until the end, by version", SECONDS, version)
        self.version_ttft = self._histogram(
            "version_time_to_first_token_seconds", "Until the first token, by version", SECONDS, version
        )
        self.uploads = self._counter("uploads", "Uploads, by status", ["status"])
        self.responses = self._counter("http_responses", "All answers, refusals too, by route", ["route", "status"])
        self.dependency_failures = self._counter(
            "dependency_failures", "Calls of the registry or the store that failed", ["dependency", "kind"]
        )
        self.retries = self._counter("retries", "Steps made again after a failure, by what was tried", ["what"])
        text = "Whether the registry or the store answers as it should"
        self.dependency_up = Gauge("manyhats_dependency_up", text, ["dependency"], registry=self.registry)
        self._count_tenants()
        self.registry.register(EngineCollector(stats, engine_pid))
        self.registry.register(ForwardCollector(forward))
        self.vllm = VllmMetrics(self.registry, stats, max_running)

    def _count_tenants(self) -> None:
        """Make the metrics of tenants."""
        by_tenant = ["tenant"]
        self.tenant_requests = self._counter("tenant_requests", "Requests ended, by status", [*by_tenant, "status"])
        self.tenant_tokens = self._counter("tenant_tokens", "Tokens, of prompts and of answers", [*by_tenant, "kind"])
        self.tenant_refusals = self._counter("tenant_refusals", "Requests over a limit", [*by_tenant, "limit"])
        text = "From arrival to the first token, by tenant"
        self.tenant_ttft = self._histogram("tenant_time_to_first_token_seconds", text, SECONDS, by_tenant)

    def _counter(self, name: str, text: str, labels: list[str]) -> Counter:
        made = Counter(f"manyhats_{name}", text, labels, registry=self.registry)
        self._metrics.append((made, frozenset(labels)))
        return made

    def _histogram(
        self, name: str, text: str, buckets: tuple[float, ...], labels: Sequence[str] = ("tenant", "task")
    ) -> Histogram:
        made = Histogram(f"manyhats_{name}", text, labels, buckets=buckets, registry=self.registry)
        self._metrics.append((made, frozenset(labels)))
        return made

    def tenant_label(self, tenant: str) -> str:
        """The label value of a tenant that is there."""
        return tenant if _is_known((tenant,), self._tenants, MAX_TENANTS) else OTHER

    def label(self, tenant: str, task: str) -> tuple[str, str]:
        """The label values of a tenant's resolved task."""
        if self.tenant_label(tenant) == OTHER:
            return OTHER, OTHER
        return tenant, task if _is_known((tenant, task), self._tasks, MAX_TASKS) else OTHER

    def version_label(self, tenant: str, task: str, number: int) -> tuple[str, str, str]:
        """The label values of a version of a resolved task; for a new one the least recently used loses its series."""
        named = self.label(tenant, task)
        key = (*named, "" if named[1] == OTHER else str(number))
        self._versions[key] = None
        self._versions.move_to_end(key)
        if len(self._versions) > MAX_VERSIONS:
            self._remove_series(self._versions.popitem(last=False)[0])
        return key

    def forget(self, tenant: str, task: str | None = None, number: int | None = None) -> None:
        """Give the series of a deleted tenant, task or version back."""
        key = tuple(str(value) for value in (tenant, task, number) if value is not None)
        self._tenants.discard(key)
        self._tasks = {known for known in self._tasks if known[: len(key)] != key}
        for version in [known for known in self._versions if known[: len(key)] == key]:
            del self._versions[version]
        self._remove_series(key)

    def _remove_series(self, key: Labels) -> None:
        values = dict(zip(LABELS, key, strict=False))
        for metric, labels in self._metrics:
            if values.keys() <= labels:
                metric.remove_by_labels(values)

    def render(self) -> bytes:
        """Render all metrics in Prometheus's text format."""
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


class ForwardCollector(Collector):
    """The base's forward as gauges, read when it is asked for; without samples while no engine is ready."""

    def __init__(self, forward: Callable[[], ForwardReport | None]) -> None:
        self._forward = forward

    def collect(self) -> Iterator[Metric]:
        """The share of each kind of part that is fused, 0 to 1, and what the base runs as in labels."""
        text = "Share of the base's parts that run fused; below 1 it is slower than it could be"
        ratio = GaugeMetricFamily("manyhats_forward_fused_ratio", text, labels=["part"])
        names = ["backend", "precision", "threads"]
        info = GaugeMetricFamily("manyhats_forward_info", "What the base runs as, always 1", labels=names)
        if (forward := self._forward()) is not None:
            for part, value in _fused_ratios(forward):
                ratio.add_metric([part], value)
            info.add_metric([forward.backend, forward.precision, str(forward.num_threads)], 1.0)
        yield from (ratio, info)


def _fused_ratios(forward: ForwardReport) -> Iterator[tuple[str, float]]:
    """Each kind of part that the base has, and the share of it that is fused."""
    for part in ("attentions", "gated_blocks", "norms"):
        count: FusedCount = getattr(forward, part)
        if count.total:
            yield part, count.fused / count.total
    yield "whole_decoder", float(forward.is_whole_decoder)
    yield "direct_forward", float(forward.is_direct)


def _is_known(key: Labels, known: set[Labels], max_keys: int) -> bool:
    """Tell if a key has a label of its own; it gets one if there is room."""
    if key not in known and len(known) >= max_keys:
        return False
    known.add(key)
    return True


def _say(name: str) -> str:
    return f"The engine's {name.replace('_', ' ')}"


def _resident(pid: int | None) -> float:
    try:
        return float(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0.0
