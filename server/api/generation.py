"""From tokens to tokens and text: the answers of one request, as they come."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from fastapi import Request

from adapters_store.tenants import Limits
from server.api.front import Front, caller_of
from server.api.prepare import Worn
from server.api.stored import check_proved
from server.api.text import TextStream
from server.api.usage import Bill
from server.engine.client import EngineUnavailable
from server.engine.messages import EngineFailure, Hat, Output, Submit, Timing
from server.errors import EngineFailedError, ServerError, UnavailableError, VersionGoneError
from server.model.batch import Logprobs, Sampling
from server.recent import Outcome

log = logging.getLogger(__name__)
T = TypeVar("T")
GRACE_S = 5.0  # the engine ends what is late; the front does where the engine is stuck


class ClientGoneError(Exception):
    """Nobody is there to read the answer."""


@dataclass(frozen=True)
class Job:
    """Everything that the answers of one request depend on."""

    worn: Worn
    prompts: list[list[int]]
    sampling: Sampling
    n: int = 1
    stop: list[str] = field(default_factory=list)
    timeout_s: float = 120.0
    arrived: float = field(default_factory=time.monotonic)
    limits: Limits = field(default_factory=Limits)

    @property
    def most_tokens(self) -> int:
        """Tokens of the prompts, and the most that the answers can have."""
        return sum(map(len, self.prompts)) + self.num_choices * self.sampling.max_tokens

    @property
    def num_choices(self) -> int:
        """Choices of all prompts; the choice `number` of prompt `prompt` has the index `prompt * n + number`."""
        return len(self.prompts) * self.n


@dataclass
class Piece:
    """What came for one choice: `finish_reason` marks its last piece."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]
    finish_reason: str | None = None

    @classmethod
    def empty(cls, index: int) -> Piece:
        """Nothing yet."""
        return cls(index, "", [], [])

    def extend(self, piece: Piece) -> None:
        """Take in the next piece of the same choice."""
        self.text += piece.text
        self.token_ids += piece.token_ids
        self.logprobs += piece.logprobs
        self.finish_reason = piece.finish_reason


@dataclass
class Answer:
    """What is known of a request's answers so far."""

    num_prompt: int
    num_completion: int = 0
    cached: dict[int, int] = field(default_factory=dict)  # prompt -> its tokens that no choice had to compute
    virtual: dict[int, int] = field(default_factory=dict)  # prompt -> virtual tokens before it
    timing: Timing = field(default_factory=Timing)
    total_ms: float = 0.0
    num_begun: int = 0  # choices that have a token
    ended: int = 0
    is_free: bool = False  # refused before any work: nobody pays
    is_over: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompts and of the answers."""
        return self.num_prompt + self.num_completion

    def used(self) -> tuple[int, int, int]:
        """What is to be paid so far: requests, prompt tokens, completion tokens."""
        if self.is_free or not (self.is_over or self.num_completion):
            return 0, 0, 0
        return int(self.is_over), self.num_prompt, self.num_completion

    def usage(self) -> dict[str, int]:
        """The contract's `usage`."""
        return {
            "prompt_tokens": self.num_prompt,
            "cached_tokens": sum(self.cached.values()),
            "virtual_tokens": sum(self.virtual.values()),
            "completion_tokens": self.num_completion,
        }

    def times(self) -> dict[str, float]:
        """The contract's `timing`."""
        marks = {"queued_ms": self.timing.queued_ms, "load_ms": self.timing.load_ms, "ttft_ms": self.timing.ttft_ms}
        return {name: round(value, 3) for name, value in {**marks, "total_ms": self.total_ms}.items()}


def start(request: Request, front: Front, job: Job) -> tuple[Answer, AsyncIterator[Piece]]:
    """The answer's books, and its pieces as they come, of all choices. The request's log line gets the books too."""
    answer = request.state.answer = Answer(sum(map(len, job.prompts)))
    return answer, _pieces(front, replace(job, limits=caller_of(request).limits), answer)


async def collect(pieces: AsyncIterator[Piece], job: Job) -> list[Piece]:
    """All of a plain answer's choices, whole."""
    choices = [Piece.empty(index) for index in range(job.num_choices)]
    async with aclosing(pieces) as coming:  # type: ignore[type-var]
        async for piece in coming:
            choices[piece.index].extend(piece)
    return choices


async def unless_moved(answer: Callable[[], Awaitable[T]]) -> T:
    """An answer; where its version is deleted before it begins, that of the route as it is now.

    A version that was named is absent the second time.
    """
    while True:
        try:
            return await answer()
        except VersionGoneError as error:
            log.info("a request is routed anew", extra={"reason": str(error)})


async def _pieces(front: Front, job: Job, answer: Answer) -> AsyncIterator[Piece]:
    """The pieces of all choices; meanwhile the artifacts are kept, and at any end the books are closed."""
    worn = job.worn
    status: str | None = "cancelled"
    places = [(worn.tenant, one.task, one.number) for one, _ in worn.hats] or [(worn.tenant, worn.task, 0)]
    with front.usage.running(Bill(places, answer.used)):
        try:
            with (
                front.in_use.hold(worn.digests),
                front.meters.generating(worn.tenant, job.limits, job.num_choices, job.most_tokens, answer),
            ):
                await front.check_kept(worn.tenant, [version for version, _ in worn.hats])
                async with aclosing(_merged(front, job, answer)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        yield piece
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
            answer.total_ms = (time.monotonic() - job.arrived) * 1000
            if status is not None:
                _close_books(front, job, answer, status)
            await front.bury(worn.digests)
    await front.usage.settle(front.registry)  # what is answered whole is paid for, also if the next moment is the last


async def _merged(front: Front, job: Job, answer: Answer) -> AsyncIterator[Piece]:
    """Run all choices at once. Whatever ends this ends them all."""
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
    choices = [
        asyncio.create_task(_feed(front, job, answer, prompt, number, queue))
        for prompt in range(len(job.prompts))
        for number in range(job.n)
    ]
    try:
        while answer.ended < len(choices):
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            answer.ended += item.finish_reason is not None
            yield item
    finally:
        for choice in choices:
            choice.cancel()
        await asyncio.gather(*choices, return_exceptions=True)


async def _feed(
    front: Front, job: Job, answer: Answer, prompt: int, number: int, queue: asyncio.Queue[Piece | Exception]
) -> None:
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + job.timeout_s + GRACE_S):
            for digest in job.worn.digests:
                await check_proved(front, digest)
            await _run_choice(front, job, answer, prompt, number, queue)
    except TimeoutError:
        failure = EngineFailure("deadline_exceeded", f"no answer within {job.timeout_s:g} s")
        queue.put_nowait(EngineFailedError(failure))
    except EngineUnavailable as error:
        queue.put_nowait(UnavailableError(str(error), retry_after=2))
    except Exception as error:  # noqa: BLE001 - whatever it is, `_pieces` raises it to the one who waits
        queue.put_nowait(error)


async def _run_choice(
    front: Front, job: Job, answer: Answer, prompt: int, number: int, queue: asyncio.Queue[Piece | Exception]
) -> None:
    index, text = prompt * job.n + number, TextStream(front.tokenizer, job.stop)
    label, last = front.metrics.label(job.worn.label), 0.0
    async with aclosing(front.client.generate(_submit(job, prompt, number))) as outputs:  # type: ignore[type-var]
        async for output in outputs:
            now = time.monotonic()
            if output.failure is not None:
                raise EngineFailedError(output.failure)
            if last and output.token_ids:
                front.metrics.gap.labels(label).observe(now - last)
            last = now
            piece = _piece(index, output, text)
            _count(answer, prompt, output, piece)
            answer.total_ms = (now - job.arrived) * 1000
            queue.put_nowait(piece)
            if piece.finish_reason is not None:
                return  # closing the outputs aborts the sequence where a stop text ended it


def _submit(job: Job, prompt: int, number: int) -> Submit:
    """One sequence. Choices differ in their seed alone, each by its own number."""
    seed = (job.sampling.seed + 0x9E3779B97F4A7C15 * (prompt * job.n + number)) % 2**63
    return Submit(
        sequence_id=uuid.uuid4().hex,
        namespace=job.worn.tenant,
        prompt=job.prompts[prompt],
        sampling=_with_seed(job.sampling, seed),
        deadline=job.arrived + job.timeout_s,
        arrived=job.arrived,
        hats=tuple(Hat(version.digest, weight, version.num_virtual) for version, weight in job.worn.hats),
        share=job.limits.share,
        max_running=job.limits.max_running,
    )


def _with_seed(sampling: Sampling, seed: int) -> Sampling:
    values = {name: getattr(sampling, name) for name in Sampling.__struct_fields__}
    return Sampling(**{**values, "seed": seed})


def _piece(index: int, output: Output, text: TextStream) -> Piece:
    """The text of an output's tokens, up to a stop text."""
    piece = Piece(index, "", [], [], output.finish_reason)
    for at, token_id in enumerate(output.token_ids):
        piece.text += text.push(token_id)
        piece.token_ids.append(token_id)
        piece.logprobs += output.logprobs[at : at + 1]
        if text.is_stopped:
            piece.finish_reason = "stop"
            return piece
    if piece.finish_reason is not None:
        piece.text += text.flush()
        piece.finish_reason = "stop" if text.is_stopped else piece.finish_reason
    return piece


def _count(answer: Answer, prompt: int, output: Output, piece: Piece) -> None:
    answer.num_begun += output.timing is not None  # the engine's first output has it
    answer.num_completion += len(piece.token_ids)
    answer.cached[prompt] = min(answer.cached.get(prompt, output.cached_tokens), output.cached_tokens)
    answer.virtual[prompt] = output.virtual_tokens
    if output.timing is not None and answer.timing.ttft_ms < output.timing.ttft_ms:
        answer.timing = output.timing


def _close_books(front: Front, job: Job, answer: Answer, status: str) -> None:
    metrics, worn = front.metrics, job.worn
    label, tenant = metrics.label(worn.label), metrics.tenant_label(worn.tenant)
    metrics.requests.labels(label, status).inc()
    metrics.tenant_requests.labels(tenant, status).inc()
    answer.is_over = True
    _judge_version(front, job, answer, status)
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


def _judge_version(front: Front, job: Job, answer: Answer, status: str) -> None:
    """What a canary is judged by: requests that wear it alone. Who left early says nothing of it but that."""
    metrics, worn = front.metrics, job.worn
    if len(worn.hats) != 1:
        return
    version = worn.hats[0][0]
    labels = metrics.version_label(version.task, version.number)
    metrics.version_requests.labels(*labels, status).inc()
    if status == "200":
        metrics.version_tokens.labels(*labels).inc(answer.num_completion)
        metrics.version_latency.labels(*labels).observe(answer.total_ms / 1000)
        metrics.version_ttft.labels(*labels).observe(answer.timing.ttft_ms / 1000)
    if status != "cancelled":
        outcome = Outcome(status, answer.timing.ttft_ms, answer.total_ms, answer.num_completion)
        front.recent.add((worn.tenant, version.task, version.number), outcome)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, cancelled where the client leaves before it is done (raises `ClientGoneError`).

    The body must have been read: the next thing that `receive` says is that the client has gone.
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for side in (task, gone):
            side.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
