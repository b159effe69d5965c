"""OpenAI's shape: the official client works unchanged; `model` is a task, or `base`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from adapters_store.registry.registry import Task
from server.api.deps import admit, may, state_of, tenant_of
from server.api.disconnect import unless_gone
from server.api.sse import EventStream
from server.errors import InvalidFieldError
from server.requests.answer import Chunk, GenerationJob, GenerationState
from server.requests.auth import GENERATE
from server.requests.generation import collect, start, unless_moved
from server.requests.resolve import check_length, encode_chat, encode_prompts, resolve_adapter, to_sampling
from server.requests.tokenizer import REPLACEMENT
from server.schemas import (
    BASE,
    MAX_PROMPTS,
    MAX_TURNS,
    Message,
    SamplingFields,
    Stop,
    Strict,
    TokenIds,
    User,
    openapi_body,
)
from server.state import ServerState

router = APIRouter(prefix="/v1", dependencies=[Depends(admit), Depends(may(GENERATE, looking=True))])


def without_nulls(data: Any) -> Any:
    """OpenAI's clients send null for what was not given."""
    return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Strict):
    """What a stream carries beside text."""

    include_usage: bool = False


class OpenAIFields(SamplingFields):
    """What completions and chat share. Fields of OpenAI's that are not served are refused by their name."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    n: int = Field(1, ge=1, le=8)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: User | None = None
    timeout_s: float = Field(120.0, gt=0, le=3600)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return without_nulls(data)

    def stops(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class TextPart(Strict):
    """A part of what a turn says."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One chat turn, its content whole or in parts; a turn of ours may come back as it was sent."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: Any) -> Any:
        return without_nulls(data)

    def plain(self) -> Message:
        """The turn as `POST /generate` has it."""
        content = self.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        return Message(role="system" if self.role == "developer" else self.role, content=text)


class CompletionRequest(OpenAIFields):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    max_tokens: int = Field(16, ge=1)
    logprobs: int | None = Field(None, ge=0, le=5)


class ChatRequest(OpenAIFields):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_TURNS)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=5)


Shape = Callable[[Chunk], dict[str, Any]]


@router.get("/models")
async def models(request: Request) -> Response:
    """The base and all tasks of the tenant."""
    state, tenant = state_of(request), tenant_of(request)
    tasks = await asyncio.to_thread(state.registry.tasks, tenant)
    return JSONResponse({"object": "list", "data": [_model(tenant), *(_model(tenant, task) for task in tasks)]})


@router.get("/models/{name}")
async def model(request: Request, name: str) -> Response:
    """The base, or one task."""
    state, tenant = state_of(request), tenant_of(request)
    task = None if name == BASE else await state.absent_is_404(state.registry.task, tenant, name)
    return JSONResponse(_model(tenant, task))


def _model(tenant: str, task: Task | None = None) -> dict[str, Any]:
    name, created = (BASE, 0) if task is None else (task.name, int(task.versions[-1].created))
    return {"id": name, "object": "model", "created": created, "owned_by": tenant}


@router.post("/completions", openapi_extra=openapi_body(CompletionRequest))
async def completions(request: Request) -> Response:
    """OpenAI's completions."""
    state, tenant = state_of(request), tenant_of(request)
    asked = await state.body(request, CompletionRequest)
    return await unless_moved(lambda: _complete(request, state, tenant, asked))


async def _complete(request: Request, state: ServerState, tenant: str, asked: CompletionRequest) -> Response:
    resolved = await resolve_adapter(state, tenant, asked.model, user=asked.user)
    request.state.task = resolved.task
    prompts = await _prompts(state, asked)
    check_length(state, resolved, prompts, asked.max_tokens)
    sampling = to_sampling(state, asked, asked.max_tokens, asked.logprobs)
    job = GenerationJob(resolved, prompts, sampling, asked.n, asked.stops(), asked.timeout_s)
    offsets: dict[int, int] = {}

    def shape(chunk: Chunk) -> dict[str, Any]:
        logprobs = None if asked.logprobs is None else _completion_logprobs(state, chunk, offsets)
        return {"index": chunk.index, "text": chunk.text, "finish_reason": chunk.finish_reason, "logprobs": logprobs}

    return await _answer(request, state, job, asked, "text_completion", shape, shape)


@router.post("/chat/completions", openapi_extra=openapi_body(ChatRequest))
async def chat_completions(request: Request) -> Response:
    """OpenAI's chat completions."""
    state, tenant = state_of(request), tenant_of(request)
    asked = await state.body(request, ChatRequest)
    return await unless_moved(lambda: _chat(request, state, tenant, asked))


async def _chat(request: Request, state: ServerState, tenant: str, asked: ChatRequest) -> Response:
    resolved = await resolve_adapter(state, tenant, asked.model, user=asked.user)
    request.state.task = resolved.task
    prompts = [await encode_chat(state, [message.plain() for message in asked.messages], resolved)]
    max_tokens = asked.max_completion_tokens or asked.max_tokens
    if max_tokens is None:  # OpenAI's default: the rest of the context
        max_tokens = max(1, state.ready().max_sequence_tokens - resolved.num_virtual - len(prompts[0]))
    check_length(state, resolved, prompts, max_tokens)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise InvalidFieldError("top_logprobs needs logprobs: true", "top_logprobs")
    sampling = to_sampling(state, asked, max_tokens, (asked.top_logprobs or 0) if asked.logprobs else None)
    job = GenerationJob(resolved, prompts, sampling, asked.n, asked.stops(), asked.timeout_s)
    opened: set[int] = set()

    def logprobs(chunk: Chunk) -> dict[str, Any] | None:
        return {"content": _chat_logprobs(state, chunk), "refusal": None} if asked.logprobs else None

    def whole(chunk: Chunk) -> dict[str, Any]:
        message = {"role": "assistant", "content": chunk.text, "refusal": None}
        rest = {"finish_reason": chunk.finish_reason, "logprobs": logprobs(chunk)}
        return {"index": chunk.index, "message": message, **rest}

    def delta(chunk: Chunk) -> dict[str, Any]:
        role = {} if chunk.index in opened else {"role": "assistant"}
        opened.add(chunk.index)
        rest = {"finish_reason": chunk.finish_reason, "logprobs": logprobs(chunk)}
        return {"index": chunk.index, "delta": {**role, "content": chunk.text}, **rest}

    return await _answer(request, state, job, asked, "chat.completion", whole, delta)


async def _prompts(state: ServerState, asked: CompletionRequest) -> list[list[int]]:
    prompt = asked.prompt
    texts = [prompt] if isinstance(prompt, str) else [text for text in prompt if isinstance(text, str)]
    if texts:
        return await encode_prompts(state, texts)
    many = [ids for ids in prompt if isinstance(ids, list)]
    return many or [[token for token in prompt if isinstance(token, int)]]


async def _answer(
    request: Request, state: ServerState, job: GenerationJob, asked: OpenAIFields, kind: str, whole: Shape, delta: Shape
) -> Response:
    request_id: str = request.state.request_id
    prefix = "chatcmpl" if kind.startswith("chat") else "cmpl"
    head = {"id": f"{prefix}-{request_id}", "created": int(time.time()), "model": asked.model}
    if not asked.stream:
        return JSONResponse(await unless_gone(request, _whole(request, state, job, head | {"object": kind}, whole)))
    include_usage = asked.stream_options is not None and asked.stream_options.include_usage
    chunk_kind = kind + ".chunk" if kind.startswith("chat") else kind
    events = _chunks(request, state, job, head | {"object": chunk_kind}, delta, include_usage)
    return await unless_gone(request, EventStream.begin(events, request_id))


async def _whole(
    request: Request, state: ServerState, job: GenerationJob, head: dict[str, Any], shape: Shape
) -> dict[str, Any]:
    generation, chunks = start(request, state, job)
    choices = [shape(choice) for choice in await collect(chunks, job)]
    return head | {"choices": choices, "usage": _usage(generation)}


async def _chunks(
    request: Request, state: ServerState, job: GenerationJob, head: dict[str, Any], shape: Shape, include_usage: bool
) -> AsyncGenerator[dict[str, Any]]:
    generation, chunks = start(request, state, job)
    usage: dict[str, Any] = {"usage": None} if include_usage else {}
    async with aclosing(chunks) as coming:
        async for chunk in coming:
            if chunk.text or chunk.finish_reason is not None or chunk.logprobs:
                yield head | {"choices": [shape(chunk)]} | usage
    if include_usage:
        yield head | {"choices": [], "usage": _usage(generation)}


def _usage(generation: GenerationState) -> dict[str, Any]:
    return {
        "prompt_tokens": generation.num_prompt,
        "completion_tokens": generation.num_completion,
        "total_tokens": generation.num_prompt + generation.num_completion,
        "prompt_tokens_details": {"cached_tokens": generation.usage()["cached_tokens"]},
        "virtual_tokens": generation.usage()["virtual_tokens"],
    }


def _completion_logprobs(state: ServerState, chunk: Chunk, offsets: dict[int, int]) -> dict[str, Any]:
    """OpenAI's older form: parallel lists; `text_offset` counts characters of the answer, also over chunks."""
    tokens = [state.tokenizer.decode([token], skip_special=False) for token in chunk.token_ids]
    starts = []
    for token in tokens:
        starts.append(offsets.get(chunk.index, 0))
        offsets[chunk.index] = starts[-1] + len(token)
    tops = [
        {state.tokenizer.decode([token], skip_special=False): value for token, value in logprobs.top}
        for logprobs in chunk.logprobs
    ]
    chosen = [logprobs.chosen for logprobs in chunk.logprobs]
    return {"tokens": tokens, "token_logprobs": chosen, "top_logprobs": tops, "text_offset": starts}


def _chat_logprobs(state: ServerState, chunk: Chunk) -> list[dict[str, Any]]:
    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        token = state.tokenizer.decode([token_id], skip_special=False)
        is_part = REPLACEMENT in token  # of a character: its own bytes are not known here
        return {"token": token, "logprob": logprob, "bytes": None if is_part else list(token.encode())}

    pairs = zip(chunk.token_ids, chunk.logprobs, strict=True)
    return [
        entry(token_id, logprobs.chosen) | {"top_logprobs": [entry(*top) for top in logprobs.top]}
        for token_id, logprobs in pairs
    ]
