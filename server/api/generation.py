"""From a checked request to tokens and text: what POST /generate and OpenAI's routes share."""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request

from adapters_store.artifact import PromptFormat
from adapters_store.registry import Version
from server.api.front import Front
from server.api.text import TextStream
from server.api.wire import BASE, Message, SamplingFields, WeightedTask
from server.engine.client import EngineUnavailable
from server.engine.messages import EngineFailure, Hat, Output, Submit, Timing
from server.errors import BadRequestError, EngineFailedError, InvalidFieldError, NotFoundError, UnavailableError
from server.model.batch import Logprobs, Sampling

T = TypeVar("T")
GRACE_S = 5.0  # the engine ends what is late; the front does where the engine is stuck
THREAD_CHARS = 4000  # longer texts are tokenised off the event loop


class ClientGoneError(Exception):
    """Nobody is there to read the answer."""


@dataclass(frozen=True)
class Worn:
    """What a request wears: its tasks' versions with weights, resolved once, here. Nothing is the base."""

    tenant: str
    task: str
    hats: tuple[tuple[Version, float], ...] = ()

    @property
    def prompt_format(self) -> PromptFormat | None:
        """How chat turns are written. Raises `InvalidFieldError` where several adapters disagree."""
        formats = [version.prompt_format for version, _ in self.hats]
        if any(other != formats[0] for other in formats[1:]):
            raise InvalidFieldError(
                "these adapters were trained with different prompt formats: send a prompt", "messages"
            )
        return formats[0] if formats else None

    @property
    def digests(self) -> list[str]:
        """The artifacts to keep while the request runs."""
        return [version.digest for version, _ in self.hats]


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


@dataclass
class Piece:
    """What came for one choice: `finish_reason` marks its last piece."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[Logprobs]
    finish_reason: str | None = None

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
    num_cached: int = 0
    num_virtual: int = 0
    timing: Timing = field(default_factory=Timing)
    total_ms: float = 0.0
    ended: int = 0

    def usage(self) -> dict[str, int]:
        """The contract's `usage`."""
        return {
            "prompt_tokens": self.num_prompt,
            "cached_tokens": self.num_cached,
            "virtual_tokens": self.num_virtual,
            "completion_tokens": self.num_completion,
        }

    def times(self) -> dict[str, float]:
        """The contract's `timing`."""
        marks = {"queued_ms": self.timing.queued_ms, "load_ms": self.timing.load_ms, "ttft_ms": self.timing.ttft_ms}
        return {name: round(value, 3) for name, value in {**marks, "total_ms": self.total_ms}.items()}


async def wear(front: Front, tenant: str, task: str, version: int | None = None) -> Worn:
    """Resolve a task's name to a version. `base` is the base, and asked for by that name alone."""
    if task == BASE:
        if version is not None:
            raise InvalidFieldError("the base has no versions", "version")
        return Worn(tenant, BASE)
    return Worn(tenant, task, ((await front.resolve(tenant, task, version), 1.0),))


async def wear_many(front: Front, tenant: str, tasks: list[WeightedTask]) -> Worn:
    """Resolve several hats that one request wears at once, unmerged."""
    if any(hat.task == BASE for hat in tasks):
        raise InvalidFieldError("the base is always worn; list only adapters' tasks", "adapters")
    hats = [(await front.resolve(tenant, hat.task, None), hat.weight) for hat in tasks]
    return Worn(tenant, "+".join(hat.task for hat in tasks), tuple(hats))


async def encode_prompts(front: Front, prompts: list[str]) -> list[list[int]]:
    """Tokens of texts."""
    if sum(map(len, prompts)) > THREAD_CHARS:
        return await asyncio.to_thread(lambda: [front.tokenizer.encode(prompt) for prompt in prompts])
    return [front.tokenizer.encode(prompt) for prompt in prompts]


async def encode_chat(front: Front, messages: list[Message], worn: Worn) -> list[int]:
    """Tokens of chat turns, as the adapter, or else the base, writes them."""
    turns: list[tuple[str, str]] = [(message.role, message.content) for message in messages]
    if worn.prompt_format is None and not front.tokenizer.has_chat_template:
        raise BadRequestError("this base has no chat template: send a prompt", "messages")
    return await asyncio.to_thread(front.tokenizer.encode_chat, turns, worn.prompt_format)


def to_sampling(front: Front, fields: SamplingFields, max_tokens: int, logprobs: int | None) -> Sampling:
    """The engine's form; a seed is drawn where none was given. Raises `InvalidFieldError` for unknown token ids."""
    ready = front.ready()
    bias = {int(token): value for token, value in fields.logit_bias.items()}
    if any(token >= ready.vocab_size for token in bias):
        raise InvalidFieldError(f"logit_bias names a token over {ready.vocab_size - 1}", "logit_bias")
    values = fields.model_dump(include=set(SamplingFields.model_fields)) | {"logit_bias": bias}
    values["seed"] = secrets.randbits(63) if fields.seed is None else fields.seed
    return Sampling(max_tokens=max_tokens, logprobs=logprobs, **values)


def check_length(front: Front, prompts: list[list[int]], max_tokens: int) -> None:
    """Refuse what could never fit, before anything queues."""
    ready = front.ready()
    for prompt in prompts:
        if not prompt:
            raise BadRequestError("the prompt has no tokens", "prompt")
        if max(prompt) >= ready.vocab_size:
            raise InvalidFieldError(f"prompt_token_ids has a token over {ready.vocab_size - 1}", "prompt_token_ids")
        if len(prompt) + max_tokens > ready.max_sequence_tokens:
            raise BadRequestError(
                f"the prompt has {len(prompt)} tokens and max_tokens is {max_tokens}; together they are over this "
                f"server's {ready.max_sequence_tokens}",
                "prompt",
            )


def start(front: Front, job: Job) -> tuple[Answer, AsyncIterator[Piece]]:
    """The answer's books, and its pieces as they come, of all choices."""
    answer = Answer(sum(map(len, job.prompts)))
    return answer, _pieces(front, job, answer)


async def _pieces(front: Front, job: Job, answer: Answer) -> AsyncIterator[Piece]:
    """Run all choices at once. Whatever ends this ends them all, and the books are closed."""
    queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
    choices = [
        asyncio.create_task(_feed(front, job, answer, prompt, number, queue))
        for prompt in range(len(job.prompts))
        for number in range(job.n)
    ]
    status = "cancelled"
    try:
        with front.in_use.hold(job.worn.digests):
            while answer.ended < len(choices):
                item = await queue.get()
                if isinstance(item, Exception):
                    status = str(getattr(item, "status", 500))
                    raise item
                yield item
            status = "200"
    finally:
        for choice in choices:
            choice.cancel()
        await asyncio.gather(*choices, return_exceptions=True)
        answer.total_ms = (time.monotonic() - job.arrived) * 1000
        _close_books(front, job, answer, status)
        await front.bury(job.worn.digests)


async def _feed(
    front: Front, job: Job, answer: Answer, prompt: int, number: int, queue: asyncio.Queue[Piece | Exception]
) -> None:
    try:
        async with asyncio.timeout_at(asyncio.get_running_loop().time() + job.timeout_s + GRACE_S):
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
    label, last = front.metrics.label(job.worn.task), 0.0
    async with aclosing(front.client.generate(_submit(job, prompt, number))) as outputs:  # type: ignore[type-var]
        async for output in outputs:
            now = time.monotonic()
            if output.failure is not None:
                raise EngineFailedError(output.failure)
            if last and output.token_ids:
                front.metrics.gap.labels(label).observe(now - last)
            last = now
            piece = _piece(index, output, text)
            _count(answer, output, piece)
            answer.ended += piece.finish_reason is not None
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
        hats=tuple(Hat(version.digest, weight) for version, weight in job.worn.hats),
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


def _count(answer: Answer, output: Output, piece: Piece) -> None:
    answer.num_completion += len(piece.token_ids)
    answer.num_cached = max(answer.num_cached, output.cached_tokens)
    answer.num_virtual = max(answer.num_virtual, output.virtual_tokens)
    if output.timing is not None and answer.timing.ttft_ms < output.timing.ttft_ms:
        answer.timing = output.timing


def _close_books(front: Front, job: Job, answer: Answer, status: str) -> None:
    metrics, worn = front.metrics, job.worn
    label = metrics.label(worn.task)
    metrics.requests.labels(label, status).inc()
    metrics.prompt_tokens.labels(label).inc(answer.num_prompt)
    metrics.completion_tokens.labels(label).inc(answer.num_completion)
    metrics.cached_tokens.labels(label).inc(answer.num_cached)
    if status == "200":
        metrics.latency.labels(label).observe(answer.total_ms / 1000)
        metrics.ttft.labels(label).observe(answer.timing.ttft_ms / 1000)
        metrics.queued.labels(label).observe(answer.timing.queued_ms / 1000)
        metrics.load.labels(label).observe(answer.timing.load_ms / 1000)
    for name, number in [(v.task, v.number) for v, _ in worn.hats] or [(worn.task, 0)]:
        front.usage.add(worn.tenant, name, number, answer.num_prompt, answer.num_completion)


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


def task_of(task: str | None) -> str:
    """The task that a request names. Raises `BadRequestError` where it names none, `NotFoundError` for no name."""
    if not task:
        raise BadRequestError("name a task: POST /generate?task=NAME (task=base is the base itself)", "task")
    if len(task) > 63:
        raise NotFoundError(f"there is no task {task[:63]}", "task")
    return task
