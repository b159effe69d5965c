"""From tokens to tokens and text: the answers of one request, as they come."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from typing import TypeVar

from fastapi import Request

from server.api.deps import caller_of
from server.core import AdapterRef, EngineFailure, Sampling
from server.engine.client import EngineUnavailable
from server.engine.messages import Output, Submit
from server.errors import EngineFailedError, ServerError, UnavailableError, VersionGoneError
from server.requests.accounting import close_books, count
from server.requests.answer import Chunk, GenerationJob, GenerationState
from server.requests.detokenizer import TextStream
from server.requests.usage import UsageMeter
from server.state import ServerState
from server.uploads.revalidation import ensure_validated

log = logging.getLogger(__name__)
T = TypeVar("T")
GRACE_S = 5.0  # the engine ends what is late; the front does where the engine is stuck


def start(request: Request, state: ServerState, job: GenerationJob) -> tuple[GenerationState, AsyncGenerator[Chunk]]:
    """The answer's books, and its pieces as they come, of all choices. The request's log line gets the books too."""
    generation = request.state.generation = GenerationState(sum(map(len, job.prompts)))
    return generation, _chunks(state, replace(job, limits=caller_of(request).limits), generation)


async def collect(chunks: AsyncGenerator[Chunk], job: GenerationJob) -> list[Chunk]:
    """All of a plain answer's choices, whole."""
    choices = [Chunk.empty(index) for index in range(job.num_choices)]
    async with aclosing(chunks) as coming:
        async for chunk in coming:
            choices[chunk.index].extend(chunk)
    return choices


async def unless_moved(attempt: Callable[[], Awaitable[T]]) -> T:
    """An answer; where its version is deleted before it begins, that of the route as it is now.

    A version that was named is absent the second time.
    """
    while True:
        try:
            return await attempt()
        except VersionGoneError as error:
            log.info("a request is routed anew", extra={"reason": str(error)})


async def _chunks(state: ServerState, job: GenerationJob, generation: GenerationState) -> AsyncGenerator[Chunk]:
    """The pieces of all choices; meanwhile the artifacts are kept, and at any end the books are closed."""
    resolved = job.resolved
    status: str | None = "cancelled"
    places = [(resolved.tenant, one.task, one.number) for one, _ in resolved.adapters] or [
        (resolved.tenant, resolved.task, 0)
    ]
    with state.usage.running(UsageMeter(places, generation.used)):
        try:
            with (
                state.in_use.hold(resolved.digests),
                state.rate_limiter.generating(
                    resolved.tenant, job.limits, job.num_choices, job.max_total_tokens, generation
                ),
            ):
                await state.ensure_not_deleted(resolved.tenant, [version for version, _ in resolved.adapters])
                async with aclosing(_merged(state, job, generation)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            status = "200"
        except VersionGoneError:
            status = None  # nothing has begun, and it is tried again
            raise
        except ServerError as error:
            status = str(error.status)
            raise
        except Exception:
            status = "500"
            raise
        finally:
            generation.total_ms = (time.monotonic() - job.arrived) * 1000
            if status is not None:
                close_books(state, job, generation, status)
            await state.delete_if_unreferenced(resolved.digests)
    await state.usage.wait_until_durable(
        state.registry
    )  # what is answered whole is paid for, also if the next moment is the last


async def _merged(state: ServerState, job: GenerationJob, generation: GenerationState) -> AsyncGenerator[Chunk]:
    """Run all choices at once. Whatever ends this ends them all."""
    queue: asyncio.Queue[Chunk | Exception] = asyncio.Queue()
    choices = [
        asyncio.create_task(_feed(state, job, generation, prompt, number, queue))
        for prompt in range(len(job.prompts))
        for number in range(job.n)
    ]
    try:
        while generation.ended < len(choices):
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            generation.ended += item.finish_reason is not None
            yield item
    finally:
        for choice in choices:
            choice.cancel()
        await asyncio.gather(*choices, return_exceptions=True)


async def _feed(
    state: ServerState,
    job: GenerationJob,
    generation: GenerationState,
    prompt: int,
    number: int,
    queue: asyncio.Queue[Chunk | Exception],
) -> None:
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + job.timeout_s + GRACE_S):
            for digest in job.resolved.digests:
                await ensure_validated(state, digest)
            await _run_choice(state, job, generation, prompt, number, queue)
    except TimeoutError:
        failure = EngineFailure("deadline_exceeded", f"no answer within {job.timeout_s:g} s")
        queue.put_nowait(EngineFailedError(failure))
    except EngineUnavailable as error:
        queue.put_nowait(UnavailableError(str(error), retry_after=2))
    except Exception as error:  # noqa: BLE001 - whatever it is, `_chunks` raises it to the one who waits
        queue.put_nowait(error)


async def _run_choice(
    state: ServerState,
    job: GenerationJob,
    generation: GenerationState,
    prompt: int,
    number: int,
    queue: asyncio.Queue[Chunk | Exception],
) -> None:
    index, text = prompt * job.n + number, TextStream(state.tokenizer, job.stop)
    label, last = state.metrics.label(job.resolved.label), 0.0
    async with aclosing(state.client.generate(_submit(job, prompt, number))) as outputs:
        async for output in outputs:
            now = time.monotonic()
            if output.failure is not None:
                raise EngineFailedError(output.failure)
            if last and output.token_ids:
                state.metrics.gap.labels(label).observe(now - last)
            last = now
            chunk = _chunk(index, output, text)
            count(generation, prompt, output, chunk)
            generation.total_ms = (now - job.arrived) * 1000
            queue.put_nowait(chunk)
            if chunk.finish_reason is not None:
                return  # closing the outputs aborts the sequence where a stop text ended it


def _submit(job: GenerationJob, prompt: int, number: int) -> Submit:
    """One sequence. Choices differ in their seed alone, each by its own number."""
    seed = (job.sampling.seed + 0x9E3779B97F4A7C15 * (prompt * job.n + number)) % 2**63
    return Submit(
        sequence_id=uuid.uuid4().hex,
        namespace=job.resolved.tenant,
        prompt=job.prompts[prompt],
        sampling=_with_seed(job.sampling, seed),
        deadline=job.arrived + job.timeout_s,
        arrived=job.arrived,
        adapters=tuple(
            AdapterRef(version.digest, weight, version.num_virtual) for version, weight in job.resolved.adapters
        ),
        share=job.limits.share,
        max_running=job.limits.max_running,
    )


def _with_seed(sampling: Sampling, seed: int) -> Sampling:
    values = {name: getattr(sampling, name) for name in Sampling.__struct_fields__}
    return Sampling(**{**values, "seed": seed})


def _chunk(index: int, output: Output, text: TextStream) -> Chunk:
    """The text of an output's tokens, up to a stop text."""
    chunk = Chunk(index, "", [], [], output.finish_reason)
    for at, token_id in enumerate(output.token_ids):
        chunk.text += text.push(token_id)
        chunk.token_ids.append(token_id)
        chunk.logprobs += output.logprobs[at : at + 1]
        if text.is_stopped:
            chunk.finish_reason = "stop"
            return chunk
    if chunk.finish_reason is not None:
        chunk.text += text.flush()
        chunk.finish_reason = "stop" if text.is_stopped else chunk.finish_reason
    return chunk
