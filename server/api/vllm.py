"""Routes in vLLM's shape, which its clients and gateways ask: tokens of texts and turns, and the version."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from typing import Annotated, Any, Self

from fastapi import APIRouter, Depends, Request
from pydantic import Field, model_validator
from starlette.responses import JSONResponse, Response

from server.api import openai_fields
from server.api.body import read_json
from server.api.deps import caller_of, counted_callers, identify, refuse_unknown_query, state_of
from server.api.document import COUNTED, HAS_BODY, IDENTIFIED, errors, says
from server.api.model_name import adapters_of
from server.api.openai_fields import Tolerant
from server.api.tool_fields import MAX_TOOLS, ChatMessage, Tool, turns_of
from server.api.vllm_answers import ServerVersionAnswer, TextAnswer, TokensAnswer
from server.core import Sampling
from server.errors import BadRequestError, InvalidFieldError
from server.requests.auth import GENERATE, Caller
from server.requests.spec import GenerationSpec
from server.schemas import BASE, MAX_TURNS, TokenIds, openapi_body

router = APIRouter(tags=["vLLM"])
TOKENS: dict[str, Any] = {"dependencies": counted_callers(GENERATE)}
TOKEN_ERRORS = errors(*COUNTED, *HAS_BODY)


class TokenizeRequest(Tolerant):
    """The body of POST /tokenize: a prompt, or chat turns as the model writes them."""

    neutral = openai_fields.TOKENIZE
    model: str = BASE
    prompt: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_TURNS)] | None = None
    add_special_tokens: bool | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise BadRequestError("give exactly one of prompt, messages", "prompt")
        if self.messages is not None and self.add_special_tokens:
            raise InvalidFieldError(
                "add_special_tokens: what the model writes around messages is fixed: leave it out", "add_special_tokens"
            )
        if self.tools and self.messages is None:
            raise InvalidFieldError("tools: only messages have tools: leave them out", "tools")
        return self


class DetokenizeRequest(Tolerant):
    """The body of POST /detokenize."""

    model: str = BASE
    tokens: TokenIds


@router.post(
    "/tokenize",
    openapi_extra=openapi_body(TokenizeRequest),
    responses=TOKEN_ERRORS | says(TokensAnswer),
    **TOKENS,
)
async def tokenize(request: Request) -> Response:
    """The token ids that a prompt or chat turns would be answered from, in the shape of vLLM's."""
    state = state_of(request)
    asked = await read_json(request, TokenizeRequest, state)
    spec = replace(
        _spec(caller_of(request), asked.model),
        texts=None if asked.prompt is None else [asked.prompt],
        turns=None if asked.messages is None else turns_of(asked.messages),
        tools=[tool.function.tool() for tool in asked.tools],
        prompt_field="prompt" if asked.messages is None else "messages",
        has_special=asked.add_special_tokens is not False,
    )
    (tokens,) = await state.generation.encode(spec)
    names = [state.tokenizer.token_name(token_id) for token_id in tokens] if asked.return_token_strs else None
    max_tokens = state.uploads.require_ready().max_sequence_tokens
    return JSONResponse({"count": len(tokens), "max_model_len": max_tokens, "tokens": tokens, "token_strs": names})


@router.post(
    "/detokenize",
    openapi_extra=openapi_body(DetokenizeRequest),
    responses=TOKEN_ERRORS | says(TextAnswer),
    **TOKENS,
)
async def detokenize(request: Request) -> Response:
    """The text of token ids, special ones by their names, in the shape of vLLM's."""
    state = state_of(request)
    asked = await read_json(request, DetokenizeRequest, state)
    spec = replace(_spec(caller_of(request), asked.model), token_ids=[asked.tokens], prompt_field="tokens")
    return JSONResponse({"prompt": await state.generation.decode(spec)})


def _spec(caller: Caller, model: str) -> GenerationSpec:
    """A spec of a model without a prompt, of which nothing is generated."""
    named = adapters_of(model, None, None)
    return GenerationSpec(tenant=caller.tenant, limits=caller.limits, sampling=Sampling(), max_tokens=None, **named)


@router.get(
    "/version",
    name="server_version",
    dependencies=[Depends(identify), Depends(refuse_unknown_query)],
    responses=errors(*IDENTIFIED, 422) | says(ServerVersionAnswer),
)
async def server_version() -> Response:
    """The version of this server."""
    return JSONResponse({"version": version("manyhats")})
