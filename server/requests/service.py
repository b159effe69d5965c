"""GenerationService: a route hands it a spec and reads the answers; everything between the two happens here."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

from adapters_store.format.manifest import ToolFormatName
from server.engine.client import EngineClient
from server.errors import VersionGoneError
from server.metrics import Metrics
from server.requests.accounting import Accounting
from server.requests.answer import Chunk, Generation, GenerationJob, GenerationState
from server.requests.generation import ChoiceRunner
from server.requests.prepare import JobPreparer
from server.requests.rate_limits import RateLimiter
from server.requests.resolve import AdapterResolver
from server.requests.spec import GenerationSpec
from server.requests.tokenizer import Tokenizer
from server.requests.usage import UsageBuffer, UsageMeter
from server.requests.version_stats import Recent
from server.stores import Stores
from server.tenant_work import TenantWork
from server.uploads.retention import ArtifactRetention
from server.uploads.revalidation import Revalidation

log = logging.getLogger(__name__)


class GenerationService:
    """Answers generation specs: resolves, prepares, limits, runs and accounts for each."""

    def __init__(
        self,
        client: EngineClient,
        stores: Stores,
        tokenizer: Tokenizer,
        tenant_work: TenantWork,
        metrics: Metrics,
        usage: UsageBuffer,
        rate_limiter: RateLimiter,
        recent: Recent,
        retention: ArtifactRetention,
        revalidation: Revalidation,
        tool_format: ToolFormatName | None = None,
    ) -> None:
        self._stores, self._usage = stores, usage
        self._rate_limiter, self._retention = rate_limiter, retention
        self.resolver = AdapterResolver(stores)
        self._preparer = JobPreparer(client, tokenizer, tenant_work, tool_format)
        self._accounting = Accounting(metrics, recent)
        self._runner = ChoiceRunner(client, tokenizer, metrics, revalidation)

    def run(self, spec: GenerationSpec) -> Generation:
        """The answers to a spec; nothing runs before they are read. Reading them raises `ServerError`.

        If a version is deleted after it was resolved and before its answers begin, the spec is resolved anew, by the
        route as it is then; a version that was named is absent (404) the second time.
        """
        generation = Generation()
        generation.chunks = self._routed(spec, generation)
        return generation

    async def encode(self, spec: GenerationSpec) -> list[list[int]]:
        """The token ids that each answer to a spec would begin from; nothing runs. Raises `ServerError`."""
        return await self._preparer.encode(spec, await self.resolver.resolve(spec))

    async def decode(self, spec: GenerationSpec) -> str:
        """The text of a spec's only prompt, of token ids. Raises `ServerError`, also for a model that is absent."""
        await self.resolver.resolve(spec)
        (token_ids,) = spec.token_ids or [[]]
        return await self._preparer.decode(token_ids, spec.prompt_field)

    async def _routed(self, spec: GenerationSpec, generation: Generation) -> AsyncGenerator[Chunk]:
        while True:
            generation.resolved = await self.resolver.resolve(spec)
            generation.job = job = await self._preparer.prepare(spec, generation.resolved)
            generation.progress = progress = GenerationState(job.num_prompt_tokens)
            try:
                async with aclosing(self._answers(job, progress)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except VersionGoneError as error:  # raised before the first chunk only
                log.info("a request is routed anew", extra={"reason": str(error)})
            else:
                return

    async def _answers(self, job: GenerationJob, progress: GenerationState) -> AsyncGenerator[Chunk]:
        """Chunks of all choices; meanwhile the artifacts are kept, and at any end the request is accounted for."""
        resolved = job.resolved
        async with self._retention.using(resolved.tenant, resolved.versions):
            with (
                self._usage.running(UsageMeter(resolved.usage_keys, progress.used)),
                self._accounting.accounted(job, progress),
                self._rate_limiter.generating(
                    resolved.tenant, job.limits, job.num_sequences, job.max_total_tokens, progress
                ),
            ):
                async with aclosing(self._runner.run_choices(job, progress)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        # An answer that is whole is paid for, also if the next moment is this process's last.
        await self._usage.wait_until_durable(self._stores)
