"""Account for a finished generation: metrics, usage and version figures."""

from __future__ import annotations

from server.engine.messages import Output
from server.requests.answer import Chunk, GenerationJob, GenerationState
from server.requests.version_stats import RequestOutcome
from server.state import ServerState


def count(generation: GenerationState, prompt: int, output: Output, chunk: Chunk) -> None:
    generation.num_begun += output.timing is not None  # the engine's first output has it
    generation.num_completion += len(chunk.token_ids)
    generation.cached[prompt] = min(generation.cached.get(prompt, output.cached_tokens), output.cached_tokens)
    generation.virtual[prompt] = output.virtual_tokens
    if output.timing is not None and generation.timing.ttft_ms < output.timing.ttft_ms:
        generation.timing = output.timing


def close_books(state: ServerState, job: GenerationJob, generation: GenerationState, status: str) -> None:
    metrics, resolved = state.metrics, job.resolved
    label, tenant = metrics.label(resolved.label), metrics.tenant_label(resolved.tenant)
    metrics.requests.labels(label, status).inc()
    metrics.tenant_requests.labels(tenant, status).inc()
    generation.is_over = True
    _judge_version(state, job, generation, status)
    if status == "200":
        metrics.latency.labels(label).observe(generation.total_ms / 1000)
        metrics.ttft.labels(label).observe(generation.timing.ttft_ms / 1000)
        metrics.tenant_ttft.labels(tenant).observe(generation.timing.ttft_ms / 1000)
        metrics.queued.labels(label).observe(generation.timing.queued_ms / 1000)
        metrics.load.labels(label).observe(generation.timing.load_ms / 1000)
    elif status != "cancelled" and not generation.num_completion:
        generation.is_free = True
        return
    counts = generation.usage()
    metrics.prompt_tokens.labels(label).inc(counts["prompt_tokens"])
    metrics.completion_tokens.labels(label).inc(counts["completion_tokens"])
    metrics.cached_tokens.labels(label).inc(counts["cached_tokens"])
    metrics.tenant_tokens.labels(tenant, "prompt").inc(counts["prompt_tokens"])
    metrics.tenant_tokens.labels(tenant, "completion").inc(counts["completion_tokens"])


def _judge_version(state: ServerState, job: GenerationJob, generation: GenerationState, status: str) -> None:
    """What a canary is judged by: requests that wear it alone. Who left early says nothing of it but that."""
    metrics, resolved = state.metrics, job.resolved
    if len(resolved.adapters) != 1:
        return
    version = resolved.adapters[0][0]
    labels = metrics.version_label(version.task, version.number)
    metrics.version_requests.labels(*labels, status).inc()
    if status == "200":
        metrics.version_tokens.labels(*labels).inc(generation.num_completion)
        metrics.version_latency.labels(*labels).observe(generation.total_ms / 1000)
        metrics.version_ttft.labels(*labels).observe(generation.timing.ttft_ms / 1000)
    if status != "cancelled":
        outcome = RequestOutcome(status, generation.timing.ttft_ms, generation.total_ms, generation.num_completion)
        state.recent.add((resolved.tenant, version.task, version.number), outcome)
