"""Account for a finished generation: metrics by task, tenant and version, and the figures that judge a canary."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from server.errors import ServerError
from server.metrics import Metrics
from server.requests.answer import GenerationJob, GenerationState
from server.requests.version_stats import Recent, RequestOutcome


class Accounting:
    """Writes how each request ended into the metrics and the versions' recent outcomes."""

    def __init__(self, metrics: Metrics, recent: Recent) -> None:
        self._metrics, self._recent = metrics, recent

    @contextmanager
    def accounted(self, job: GenerationJob, progress: GenerationState) -> Iterator[None]:
        """Account for the answers that the block makes, at any end.

        The status is that of the error raised, 200 without one, `cancelled` if the client left.
        """
        status, tasks = "cancelled", [one.task for one in job.resolved.versions]
        with self._metrics.vllm.in_flight(tasks, lambda: progress.num_begun > 0):
            try:
                yield
                status = "200"
            except ServerError as error:
                status = str(error.status)
                raise
            except Exception:
                status = "500"
                raise
            finally:
                progress.total_ms = (time.monotonic() - job.arrived) * 1000
                self._close(job, progress, status)

    def _close(self, job: GenerationJob, progress: GenerationState, status: str) -> None:
        metrics, resolved = self._metrics, job.resolved
        label, tenant = metrics.label(resolved.tenant, resolved.label), metrics.tenant_label(resolved.tenant)
        metrics.requests.labels(*label, status).inc()
        metrics.tenant_requests.labels(tenant, status).inc()
        progress.is_over = True
        self._judge_version(job, progress, status)
        if status == "200":
            metrics.latency.labels(*label).observe(progress.total_ms / 1000)
            metrics.ttft.labels(*label).observe(progress.timing.ttft_ms / 1000)
            metrics.vllm.ttft.observe(progress.timing.ttft_ms / 1000)
            metrics.tenant_ttft.labels(tenant).observe(progress.timing.ttft_ms / 1000)
            metrics.queued.labels(*label).observe(progress.timing.queued_ms / 1000)
            metrics.load.labels(*label).observe(progress.timing.load_ms / 1000)
        elif status != "cancelled" and not progress.num_completion:
            progress.is_free = True
            return
        self._count_tokens(label, tenant, progress.usage())

    def _count_tokens(self, label: tuple[str, str], tenant: str, counts: dict[str, int]) -> None:
        metrics = self._metrics
        metrics.prompt_tokens.labels(*label).inc(counts["prompt_tokens"])
        metrics.completion_tokens.labels(*label).inc(counts["completion_tokens"])
        metrics.cached_tokens.labels(*label).inc(counts["cached_tokens"])
        metrics.tenant_tokens.labels(tenant, "prompt").inc(counts["prompt_tokens"])
        metrics.tenant_tokens.labels(tenant, "completion").inc(counts["completion_tokens"])

    def _judge_version(self, job: GenerationJob, progress: GenerationState, status: str) -> None:
        """Record per-version figures, from requests that use exactly one version; a disconnect is no outcome."""
        metrics, resolved = self._metrics, job.resolved
        if len(resolved.adapters) != 1:
            return
        version = resolved.adapters[0][0]
        labels = metrics.version_label(resolved.tenant, version.task, version.number)
        metrics.version_requests.labels(*labels, status).inc()
        if status == "200":
            metrics.version_tokens.labels(*labels).inc(progress.num_completion)
            metrics.version_latency.labels(*labels).observe(progress.total_ms / 1000)
            metrics.version_ttft.labels(*labels).observe(progress.timing.ttft_ms / 1000)
        if status != "cancelled":
            outcome = RequestOutcome(status, progress.timing.ttft_ms, progress.total_ms, progress.num_completion)
            self._recent.add((resolved.tenant, version.task, version.number), outcome)
