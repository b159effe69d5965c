"""Routes in OpenAI's shape: the official client works unchanged; `model` is a task, a version of one, or `base`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, Self

from fastapi import APIRouter, Query, Request
from pydantic import Field, field_validator, model_validator
from starlette.responses import JSONResponse, Response

from server.api import openai_fields
from server.api.body import read_json
from server.api.deps import caller_of, counted_callers, look_up, state_of, tenant_of
from server.api.document import COUNTED, GENERATES, errors, says, says_whole_or_streamed
from server.api.model_name import adapters_of, split_version
from server.api.openai_answers import (
    ChatAnswer,
    ChatEvent,
    CompletionAnswer,
    CompletionEvent,
    ModelAnswer,
    ModelsAnswer,
)
from server.api.openai_fields import Tolerant
from server.api.openai_form import ChatForm, CompletionForm, OpenAIForm, UsageEvents
from server.api.respond import respond
from server.api.structured_outputs import FormFields
from server.api.tool_fields import ChatMessage, ToolFields, turns_of
from server.errors import InvalidFieldError
from server.requests.auth import GENERATE, Caller
from server.requests.spec import GenerationSpec
from server.schemas import (
    BASE,
    MAX_PROMPTS,
    MAX_TURNS,
    NAME_PATTERN,
    SamplingFields,
    Stop,
    TokenIds,
    User,
    WeightedTasks,
    openapi_body,
)
from server.state import ServerState

MAX_MODELS = 1000  # of a page
PageSize = Annotated[int, Query(ge=1, le=MAX_MODELS)]
AfterName = Annotated[str | None, Query(pattern=NAME_PATTERN)]

router = APIRouter(
    prefix="/v1",
    tags=["OpenAI"],
    dependencies=counted_callers(GENERATE, looking=True),
    responses=errors(*COUNTED),  # and 400 where other routes have 422
)
MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 512  # answers of a request


class StreamOptions(Tolerant):
    """Options of a stream: whether its last event carries the usage, and whether each one has what was used so far."""

    neutral = openai_fields.STREAM_OPTIONS
    include_usage: bool = False
    continuous_usage_stats: bool = False  # vLLM's; guidellm always asks for it


class ModelFields(Tolerant, SamplingFields):
    """Fields that all of OpenAI's generations share."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_k: int = Field(0, ge=-1, lt=2**31)
    stream: bool = False
    user: User | None = None
    adapters: WeightedTasks | None = None
    version: int | None = Field(None, ge=1)
    timeout_s: float = Field(120.0, gt=0, le=3600)

    @field_validator("top_k")
    @classmethod
    def _all(cls, top_k: int) -> int:
        return max(0, top_k)  # vLLM's clients write -1 for all


class OpenAIFields(FormFields, ModelFields):
    """Fields that completions and chat share."""

    n: int = Field(1, ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream_options: StreamOptions | None = None

    def stops(self) -> list[str]:
        """The stop texts as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(OpenAIFields):
    """The body of POST /v1/completions."""

    neutral = openai_fields.COMPLETION
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    add_special_tokens: bool = True
    max_tokens: int = Field(16, ge=0)
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _not_too_many(self) -> Self:
        num_prompts = sum(map(len, _prompts(self.prompt).values()))
        if num_prompts * self.n > MAX_CHOICES:
            raise InvalidFieldError(
                f"n: {num_prompts} prompts with {self.n} answers each are over {MAX_CHOICES} answers", "n"
            )
        return self

    @model_validator(mode="after")
    def _something_to_answer(self) -> Self:
        if not self.max_tokens and not self.echo:
            raise InvalidFieldError("max_tokens: 0 answers nothing without echo: ask for 1 or more", "max_tokens")
        return self


class ChatRequest(ToolFields, OpenAIFields):
    """The body of POST /v1/chat/completions."""

    neutral = openai_fields.CHAT
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_TURNS)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include_reasoning: bool = True


@router.get("/models", responses=says(ModelsAnswer))
async def models(request: Request, limit: PageSize = MAX_MODELS, after: AfterName = None) -> Response:
    """List a page of the tenant's tasks by name, after the base; `after` is the last id of the page before."""
    state, tenant = state_of(request), tenant_of(request)
    found = await look_up(state, state.stores.registry.task_names, tenant, after, limit + 1)
    page = [] if after is not None else [_model(state, tenant, BASE, 0)]
    page += [_model(state, tenant, name, created) for name, created in found[:limit]]
    return JSONResponse({"object": "list", "data": page, "has_more": len(found) > limit})


@router.get("/models/{name}", responses=says(ModelAnswer))
async def model(request: Request, name: str) -> Response:
    """Show the base, a task, or a version of one (`task@3`)."""
    state, tenant = state_of(request), tenant_of(request)
    if name == BASE:
        return JSONResponse(_model(state, tenant, BASE, 0))
    registry, (task, number) = state.stores.registry, split_version(name)
    if number is None:
        version = (await look_up(state, registry.task, tenant, task, None, 1)).versions[-1]
    else:
        version = await look_up(state, registry.resolve, tenant, task, number)
    return JSONResponse(_model(state, tenant, name, version.created))


def _model(state: ServerState, tenant: str, name: str, created: float) -> dict[str, Any]:
    """A model, with vLLM's fields: the `root` is the base's name or the task, the `parent` the base if it has one."""
    ready, is_base = state.client.ready, name == BASE
    said = {"id": name, "object": "model", "created": int(created), "owned_by": tenant}
    said |= {"root": state.settings.base if is_base else split_version(name)[0], "parent": None if is_base else BASE}
    return said | {"max_model_len": None if ready is None else ready.max_sequence_tokens}


@router.post(
    "/completions",
    openapi_extra=openapi_body(CompletionRequest),
    responses=errors(*GENERATES) | says_whole_or_streamed(CompletionAnswer, CompletionEvent),
)
async def completions(request: Request) -> Response:
    """Complete a prompt, in the shape of OpenAI's completions."""
    state, caller = state_of(request), caller_of(request)
    asked = await read_json(request, CompletionRequest, state)
    spec = replace(
        _spec(caller, asked),
        **_prompts(asked.prompt),
        has_special=asked.add_special_tokens,
        max_tokens=asked.max_tokens,
        has_logprobs=asked.logprobs is not None,
        top_logprobs=asked.logprobs,
        echo=asked.echo,
        prompt_logprobs=asked.logprobs if asked.echo else None,
    )
    return await _answer(request, state, asked, spec, partial(CompletionForm, texts=spec.texts, n=asked.n))


@router.post(
    "/chat/completions",
    openapi_extra=openapi_body(ChatRequest),
    responses=errors(*GENERATES) | says_whole_or_streamed(ChatAnswer, ChatEvent),
)
async def chat_completions(request: Request) -> Response:
    """Answer chat turns, in the shape of OpenAI's chat completions. Without a limit it has the rest of the context."""
    state, caller = state_of(request), caller_of(request)
    asked = await read_json(request, ChatRequest, state)
    spec = replace(
        _spec(caller, asked),
        turns=turns_of(asked.messages),
        **asked.called(),
        is_parsed=True,
        prompt_field="messages",
        max_tokens=asked.max_completion_tokens or asked.max_tokens,
        has_logprobs=bool(asked.logprobs),
        top_logprobs=asked.top_logprobs,
    )
    return await _answer(request, state, asked, spec, partial(ChatForm, has_reasoning=asked.include_reasoning))


async def _answer(
    request: Request, state: ServerState, asked: OpenAIFields, spec: GenerationSpec, shape: Callable[..., OpenAIForm]
) -> Response:
    options = asked.stream_options or StreamOptions()
    usage = UsageEvents(options.include_usage, options.continuous_usage_stats)
    form = shape(request.state.request_id, asked.model, state.tokenizer, spec.has_logprobs, usage)
    return await respond(request, state.generation, spec, form, asked.stream)


def _spec(caller: Caller, asked: OpenAIFields) -> GenerationSpec:
    """The fields that completions and chat share, as a spec without a prompt."""
    return replace(spec_of(caller, asked), n=asked.n, stop=asked.stops(), form=asked.form())


def spec_of(caller: Caller, asked: ModelFields) -> GenerationSpec:
    """The fields that all shapes share, as a spec without a prompt."""
    return GenerationSpec(
        tenant=caller.tenant,
        limits=caller.limits,
        **adapters_of(asked.model, asked.version, asked.adapters),
        user=asked.user,
        sampling=asked.sampling(),
        named=frozenset(asked.model_fields_set),
        max_tokens=None,
        timeout_s=asked.timeout_s,
    )


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> dict[str, Any]:
    """The prompt's field of a spec: one text or several, one list of tokens or several."""
    texts = [prompt] if isinstance(prompt, str) else [text for text in prompt if isinstance(text, str)]
    if texts:
        return {"texts": texts}
    many = [ids for ids in prompt if isinstance(ids, list)]
    return {"token_ids": many or [[token for token in prompt if isinstance(token, int)]]}
