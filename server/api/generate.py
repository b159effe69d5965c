"""POST /generate: one request, one task, any adapter."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from server.api.deps import admit, may, refuse_unknown_query, state_of, tenant_of
from server.api.disconnect import unless_gone
from server.api.sse import EventStream
from server.core import Logprobs
from server.errors import BadRequestError
from server.requests.answer import Chunk, GenerationJob, GenerationState
from server.requests.auth import GENERATE
from server.requests.generation import collect, start, unless_moved
from server.requests.resolve import (
    ResolvedAdapters,
    check_length,
    encode_chat,
    encode_prompts,
    resolve_adapter,
    resolve_adapters,
    task_of,
    to_sampling,
)
from server.schemas import GenerateRequest, openapi_body
from server.state import ServerState

router = APIRouter(dependencies=[Depends(admit), Depends(may(GENERATE)), Depends(refuse_unknown_query)])


@router.post("/generate", openapi_extra=openapi_body(GenerateRequest))
async def generate(request: Request, task: str | None = None) -> Response:
    """Answer with a task's adapter; see the HTTP contract for the body."""
    state, tenant = state_of(request), tenant_of(request)
    asked = await state.body(request, GenerateRequest)
    return await unless_moved(lambda: _respond(request, state, tenant, task, asked))


async def _respond(
    request: Request, state: ServerState, tenant: str, task: str | None, asked: GenerateRequest
) -> Response:
    resolved = await _resolved(state, tenant, task, asked)
    request.state.task = resolved.task
    prompts = await _prompts(state, asked, resolved)
    check_length(state, resolved, prompts, asked.max_tokens)
    sampling = to_sampling(state, asked, asked.max_tokens, asked.logprobs)
    job = GenerationJob(resolved, prompts, sampling, asked.n, asked.stop, asked.timeout_s)
    request_id: str = request.state.request_id
    if asked.stream:
        return await unless_gone(request, EventStream.begin(_events(request, state, job), request_id))
    return JSONResponse(await unless_gone(request, _whole(request, state, job)))


async def _resolved(state: ServerState, tenant: str, task: str | None, asked: GenerateRequest) -> ResolvedAdapters:
    if asked.adapters is None:
        return await resolve_adapter(state, tenant, task_of(task), asked.version, asked.user)
    if task is not None or asked.version is not None:
        raise BadRequestError("give either ?task= (with version), or adapters, not both", "adapters")
    return await resolve_adapters(state, tenant, asked.adapters, asked.user)


async def _prompts(state: ServerState, asked: GenerateRequest, resolved: ResolvedAdapters) -> list[list[int]]:
    if asked.prompt_token_ids is not None:
        return [asked.prompt_token_ids]
    if asked.messages is not None:
        return [await encode_chat(state, asked.messages, resolved)]
    texts = asked.prompt or ""
    return await encode_prompts(state, [texts] if isinstance(texts, str) else texts)


def _head(job: GenerationJob, request_id: str) -> dict[str, Any]:
    """Who answers."""
    adapters = [
        {
            "task": version.task,
            "version": version.number,
            "digest": version.digest,
            "method": version.method,
            "weight": w,
        }
        for version, w in job.resolved.adapters
    ]
    adapter = {key: adapters[0][key] for key in ("version", "digest", "method")} if adapters else None
    head: dict[str, Any] = {"id": request_id, "task": job.resolved.task, "adapter": adapter}
    return head | ({"adapters": adapters} if len(adapters) > 1 else {})


async def _whole(request: Request, state: ServerState, job: GenerationJob) -> dict[str, Any]:
    generation, chunks = start(request, state, job)
    choices = [_choice(state, job, choice) for choice in await collect(chunks, job)]
    return _head(job, request.state.request_id) | {"choices": choices} | _tail(generation)


def _tail(generation: GenerationState) -> dict[str, Any]:
    return {"usage": generation.usage(), "timing": generation.times()}


def _choice(state: ServerState, job: GenerationJob, chunk: Chunk) -> dict[str, Any]:
    choice: dict[str, Any] = {
        "text": chunk.text,
        "token_ids": chunk.token_ids,
        "finish_reason": chunk.finish_reason,
    }
    if job.sampling.logprobs is not None:
        pairs = zip(chunk.token_ids, chunk.logprobs, strict=True)
        choice["logprobs"] = [_logprobs(state, token_id, logprobs) for token_id, logprobs in pairs]
    return choice


def _logprobs(state: ServerState, token_id: int, logprobs: Logprobs) -> dict[str, Any]:
    return _token(state, token_id, logprobs.chosen) | {"top": [_token(state, *pair) for pair in logprobs.top]}


def _token(state: ServerState, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": state.tokenizer.decode([token_id], skip_special=False), "token_id": token_id, "logprob": logprob}


async def _events(request: Request, state: ServerState, job: GenerationJob) -> AsyncGenerator[dict[str, Any]]:
    """One event a step that has text or ends a choice; the very last carries usage and timing.

    The tokens of a step whose text is held back come with the next event of the choice.
    """
    generation, chunks = start(request, state, job)
    head, held = _head(job, request.state.request_id), {index: Chunk.empty(index) for index in range(job.num_choices)}
    async with aclosing(chunks) as coming:
        async for chunk in coming:
            waiting = held[chunk.index]
            chunk.token_ids, chunk.logprobs = waiting.token_ids + chunk.token_ids, waiting.logprobs + chunk.logprobs
            if not chunk.text and chunk.finish_reason is None:
                held[chunk.index] = chunk
                continue
            held[chunk.index] = Chunk.empty(chunk.index)
            event = head | {"index": chunk.index} | _choice(state, job, chunk)
            yield event | (
                _tail(generation) if generation.ended == len(held) and chunk.finish_reason is not None else {}
            )
