"""Account for a finished generation: metrics, usage and version figures."""

from __future__ import annotations

from server.engine.messages import Output
from server.requests.answer import Answer, GenerationJob, Piece
from server.requests.version_stats import RequestOutcome
from server.state import ServerState


def count(answer: Answer, prompt: int, output: Output, piece: Piece) -> None:
    answer.num_begun += output.timing is not None  # the engine's first output has it
    answer.num_completion += len(piece.token_ids)
    answer.cached[prompt] = min(answer.cached.get(prompt, output.cached_tokens), output.cached_tokens)
    answer.virtual[prompt] = output.virtual_tokens
    if output.timing is not None and answer.timing.ttft_ms < output.timing.ttft_ms:
        answer.timing = output.timing


def close_books(state: ServerState, job: GenerationJob, answer: Answer, status: str) -> None:
    metrics, resolved = state.metrics, job.resolved
    label, tenant = metrics.label(resolved.label), metrics.tenant_label(resolved.tenant)
    metrics.requests.labels(label, status).inc()
    metrics.tenant_requests.labels(tenant, status).inc()
    answer.is_over = True
    _judge_version(state, job, answer, status)
    if status == "200":
        metrics.latency.labels(label).observe(answer.total_ms / 1000)
        metrics.ttft.labels(label).observe(answer.timing.ttft_ms / 1000)
        metrics.tenant_ttft.labels(tenant).observe(answer.timing.ttft_ms / 1000)
        metrics.queued.labels(label).observe(answer.timing.queued_ms / 1000)
        metrics.load.labels(label).observe(answer.timing.load_ms / 1000)
    elif status != "cancelled" and not answer.num_completion:
        answer.is_free = True
        return
    counts = answer.usage()
    metrics.prompt_tokens.labels(label).inc(counts["prompt_tokens"])
    metrics.completion_tokens.labels(label).inc(counts["completion_tokens"])
    metrics.cached_tokens.labels(label).inc(counts["cached_tokens"])
    metrics.tenant_tokens.labels(tenant, "prompt").inc(counts["prompt_tokens"])
    metrics.tenant_tokens.labels(tenant, "completion").inc(counts["completion_tokens"])


def _judge_version(state: ServerState, job: GenerationJob, answer: Answer, status: str) -> None:
    """What a canary is judged by: requests that wear it alone. Who left early says nothing of it but that."""
    metrics, resolved = state.metrics, job.resolved
    if len(resolved.adapters) != 1:
        return
    version = resolved.adapters[0][0]
    labels = metrics.version_label(version.task, version.number)
    metrics.version_requests.labels(*labels, status).inc()
    if status == "200":
        metrics.version_tokens.labels(*labels).inc(answer.num_completion)
        metrics.version_latency.labels(*labels).observe(answer.total_ms / 1000)
        metrics.version_ttft.labels(*labels).observe(answer.timing.ttft_ms / 1000)
    if status != "cancelled":
        outcome = RequestOutcome(status, answer.timing.ttft_ms, answer.total_ms, answer.num_completion)
        state.recent.add((resolved.tenant, version.task, version.number), outcome)
