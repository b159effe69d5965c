"""POST /generate: one request, one task, any adapter."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Annotated, Any, Self

from fastapi import APIRouter, Request
from pydantic import ConfigDict, Field, model_validator
from starlette.responses import Response

from adapters_store.tools.parser import CallPart, Part, said_in
from server.api import text_generation
from server.api.answers import GenerateAnswer, GenerateEvent
from server.api.body import read_object
from server.api.deps import caller_of, counted_callers, state_of
from server.api.document import (
    COUNTED,
    EVERYWHERE,
    GENERATES,
    errors,
    says_either,
    says_streamed,
    says_whole_or_streamed,
)
from server.api.respond import AnswerForm, respond
from server.api.text_generation import TextGenerationRequest
from server.api.text_generation_answers import TextGenerationAnswer, TextGenerationError, TextGenerationEvent
from server.api.tool_fields import Message, ToolFields, call_of, turns_of
from server.core import AskedForm, FreeForm, Logprobs
from server.errors import BadRequestError, InvalidFieldError
from server.requests.answer import Chunk, Generation
from server.requests.auth import GENERATE, Caller
from server.requests.resolve import ResolvedAdapters
from server.requests.spec import GenerationSpec
from server.requests.tokenizer import Tokenizer
from server.schemas import (
    MAX_PROMPTS,
    MAX_SCORED_TOP,
    MAX_TURNS,
    AdapterFields,
    ResponseFormat,
    SamplingFields,
    Stop,
    TokenIds,
    has_field,
    openapi_body,
)

PROMPT_FIELDS = ("prompt", "messages", "prompt_token_ids")

router = APIRouter(
    tags=["Generate"],
    dependencies=counted_callers(GENERATE),
    responses=errors(*EVERYWHERE, *COUNTED, *GENERATES, 422, also=TextGenerationError),
)


class GenerateRequest(ToolFields, AdapterFields, SamplingFields):
    """The body of POST /generate."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [has_field(name) for name in PROMPT_FIELDS]})
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS)] | None = None
    prompt_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    max_tokens: int = Field(128, ge=0)
    n: int = Field(1, ge=1, le=8)
    stop: Annotated[list[Stop], Field(max_length=4)] = Field(default_factory=list)
    logprobs: int | None = Field(None, ge=0, le=5)
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_SCORED_TOP)
    stream: bool = False
    response_format: ResponseFormat | None = None
    label_probs: bool = False

    def form(self) -> AskedForm | None:
        """The form that the request names, for which null is free text; None if it names none."""
        if self.response_format is None:
            return FreeForm() if "response_format" in self.model_fields_set else None
        return self.response_format.form("response_format")

    @property
    def prompt_field(self) -> str:
        """The name of the field that has the prompt."""
        return self._prompt_fields()[0]

    def _prompt_fields(self) -> list[str]:
        return [name for name in PROMPT_FIELDS if getattr(self, name) is not None]

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = self._prompt_fields()
        if len(given) != 1:
            said = " and ".join(given) if given else "none of them"
            raise BadRequestError(f"give exactly one of prompt, messages, prompt_token_ids: this has {said}", "prompt")
        return self

    @model_validator(mode="after")
    def _tools_in_a_chat(self) -> Self:
        if self.tools and self.messages is None:
            raise InvalidFieldError("tools stand in a chat: send messages instead of a prompt", "tools")
        return self

    @model_validator(mode="after")
    def _something_to_answer(self) -> Self:
        if not self.max_tokens and self.prompt_logprobs is None and not self.label_probs:
            raise InvalidFieldError(
                "max_tokens: 0 answers nothing without prompt_logprobs or label_probs: ask for 1 or more", "max_tokens"
            )
        return self


@router.post(
    "/generate",
    openapi_extra=openapi_body(GenerateRequest, TextGenerationRequest),
    responses=says_either(
        says_whole_or_streamed(GenerateAnswer, GenerateEvent),
        says_streamed((TextGenerationEvent,), TextGenerationError, whole=TextGenerationAnswer),
    ),
)
async def generate(request: Request, task: str | None = None) -> Response:
    """Answer with a task's adapter; see the HTTP contract for the body. One with `inputs` is LoRAX's and TGI's."""
    state, caller = state_of(request), caller_of(request)
    body = await read_object(request, state)
    if "inputs" in body.data:
        return await text_generation.answer(request, task, body)
    asked = await body.read_as(GenerateRequest)
    spec = _spec(caller, task, asked)
    form = GenerateForm(request.state.request_id, state.tokenizer, asked.logprobs is not None)
    return await respond(request, state.generation, spec, form, asked.stream)


def _spec(caller: Caller, task: str | None, asked: GenerateRequest) -> GenerationSpec:
    """The spec of a body. Raises `BadRequestError` if it names no task, or two sets of adapters."""
    return GenerationSpec(
        tenant=caller.tenant,
        limits=caller.limits,
        **asked.resolvable(task),
        texts=[asked.prompt] if isinstance(asked.prompt, str) else asked.prompt,
        turns=None if asked.messages is None else turns_of(asked.messages),
        **asked.called(),
        is_parsed=bool(asked.tools),
        token_ids=None if asked.prompt_token_ids is None else [asked.prompt_token_ids],
        prompt_field=asked.prompt_field,
        sampling=asked.sampling(),
        named=frozenset(asked.model_fields_set),
        max_tokens=asked.max_tokens,
        n=asked.n,
        stop=asked.stop,
        has_logprobs=asked.logprobs is not None,
        top_logprobs=asked.logprobs,
        prompt_logprobs=asked.prompt_logprobs,
        form=asked.form(),
        label_probs=asked.label_probs,
    )


@dataclass
class GenerateForm(AnswerForm):
    """Writes answers in the form of POST /generate."""

    request_id: str
    tokenizer: Tokenizer
    has_logprobs: bool

    async def whole(self, generation: Generation) -> dict[str, Any]:
        """The body of a plain answer: its choices, usage and timing."""
        choices = [self._choice(choice) for choice in await generation.collect()]
        return self._head(generation.job.resolved) | {"choices": choices} | _tail(generation)

    async def events(self, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
        """Yield one event a step that has text or ends a choice; the very last carries usage and timing.

        The tokens of a step whose text is held back come with the next event of the choice.
        """
        head: dict[str, Any] = {}
        held: dict[int, Chunk] = {}
        async with aclosing(generation.chunks) as coming:
            async for chunk in coming:
                head = head or self._head(generation.job.resolved)
                if waiting := held.pop(chunk.index, None):
                    waiting.extend(chunk)
                    chunk = waiting
                if not (chunk.text if chunk.parts is None else chunk.parts) and chunk.finish_reason is None:
                    held[chunk.index] = chunk
                    continue
                event = head | {"index": chunk.index} | self._choice(chunk)
                is_last = generation.progress.ended == generation.job.num_choices and chunk.finish_reason is not None
                yield event | (_tail(generation) if is_last else {})

    def _head(self, resolved: ResolvedAdapters) -> dict[str, Any]:
        """The request's id and the adapters that answer it."""
        adapters = [
            {
                "task": version.task,
                "version": version.number,
                "digest": version.digest,
                "method": version.method,
                "weight": weight,
            }
            for version, weight in resolved.adapters
        ]
        adapter = {key: adapters[0][key] for key in ("version", "digest", "method")} if adapters else None
        head: dict[str, Any] = {"id": self.request_id, "task": resolved.task, "adapter": adapter}
        return head | ({"adapters": adapters} if len(adapters) > 1 else {})

    def _choice(self, chunk: Chunk) -> dict[str, Any]:
        choice: dict[str, Any] = {"text": chunk.text} if chunk.parts is None else _parts(chunk.parts)
        choice |= {"token_ids": chunk.token_ids, "finish_reason": chunk.finish_reason}
        if self.has_logprobs:
            pairs = zip(chunk.token_ids, chunk.logprobs, strict=True)
            choice["logprobs"] = [self._logprobs(token_id, logprobs) for token_id, logprobs in pairs]
        if chunk.prompt is not None:
            pairs = zip(chunk.prompt.token_ids[1:], chunk.prompt.scores, strict=True)
            choice["prompt_logprobs"] = [None, *(self._logprobs(token_id, logprobs) for token_id, logprobs in pairs)]
        if chunk.label_probs is not None:
            choice["label_probs"] = chunk.label_probs
        return choice

    def _logprobs(self, token_id: int, logprobs: Logprobs) -> dict[str, Any]:
        return self._token(token_id, logprobs.chosen) | {"top": [self._token(*pair) for pair in logprobs.top]}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        names = {"token": self.tokenizer.token_text(token_id), "token_id": token_id}
        return {**names, "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(token_id))}


def _parts(parts: list[Part]) -> dict[str, Any]:
    """Give the text, the reasoning and the calls of an answer as fields."""
    calls = [call_of(part) for part in parts if isinstance(part, CallPart)]
    reasoning = said_in(parts, "reasoning")
    return {
        "text": said_in(parts, "content"),
        **({"reasoning_content": reasoning} if reasoning else {}),
        **({"tool_calls": calls} if calls else {}),
    }


def _tail(generation: Generation) -> dict[str, Any]:
    return {"usage": generation.progress.usage(), "timing": generation.progress.times()}
