"""POST /v1/responses: OpenAI's newer form of chat, without state. Nothing is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, Self

from fastapi import APIRouter, Request
from pydantic import Field, model_validator
from starlette.responses import Response

from adapters_store.tools.turns import SYSTEM, USER, ToolTurn
from server.api import openai_fields
from server.api.body import read_json
from server.api.deps import caller_of, counted_callers, state_of
from server.api.document import COUNTED, GENERATES, errors, says_streamed
from server.api.openai import MAX_TOP_LOGPROBS, ModelFields, spec_of
from server.api.openai_fields import Tolerant
from server.api.respond import respond
from server.api.responses_answers import EVENTS, ResponseAnswer
from server.api.responses_form import ResponsesForm
from server.api.responses_input import FunctionToolFields, InputItem, turns_of_items
from server.api.structured_outputs import TextFormat
from server.core import AskedForm
from server.errors import InvalidFieldError
from server.requests.auth import GENERATE
from server.schemas import MAX_TURNS, FreeText, openapi_body

LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16

router = APIRouter(
    prefix="/v1",
    tags=["OpenAI"],
    dependencies=counted_callers(GENERATE),
    responses=errors(*COUNTED, *GENERATES),  # and 400 where other routes have 422
)


class TextConfig(Tolerant):
    """The way in which the text is written."""

    neutral = openai_fields.TEXT_CONFIG
    format: TextFormat = Field(default_factory=lambda: FreeText(type="text"))

    def form(self) -> AskedForm | None:
        """The form that the request names, or None."""
        return self.format.form("text.format") if "format" in self.model_fields_set else None


class ResponsesRequest(FunctionToolFields, ModelFields):
    """The body of POST /v1/responses."""

    neutral = openai_fields.RESPONSES
    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_TURNS)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] = Field(default_factory=list)
    top_logprobs: int = Field(0, ge=0, le=MAX_TOP_LOGPROBS)
    text: TextConfig = Field(default_factory=TextConfig)
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _logprobs_are_included(self) -> Self:
        if self.top_logprobs and not self.has_logprobs:
            raise InvalidFieldError(f'top_logprobs needs include: ["{LOGPROBS}"]', "top_logprobs")
        return self

    @property
    def has_logprobs(self) -> bool:
        """Whether the answer tells log-probabilities."""
        return LOGPROBS in self.include

    def turns(self) -> list[ToolTurn]:
        """The turns of a chat: the instructions are the system's, and a text alone is the user's."""
        turns = [ToolTurn(USER, self.input)] if isinstance(self.input, str) else turns_of_items(self.input)
        return turns if self.instructions is None else [ToolTurn(SYSTEM, self.instructions), *turns]

    def echoed(self) -> dict[str, Any]:
        """The fields that the response tells again."""
        names = ("model", "instructions", "max_output_tokens", "metadata", "top_logprobs", "user")
        told = {name: getattr(self, name) for name in names}
        told |= self.echoed_tools()
        return told | {"text": {"format": self.text.format.model_dump(by_alias=True, exclude_unset=True)}}


@router.post(
    "/responses",
    openapi_extra=openapi_body(ResponsesRequest),
    responses=says_streamed(EVENTS, None, whole=ResponseAnswer),
)
async def responses(request: Request) -> Response:
    """Answer a text or turns, in the shape of OpenAI's responses; what needs a state is refused."""
    state = state_of(request)
    asked = await read_json(request, ResponsesRequest, state)
    spec = replace(
        spec_of(caller_of(request), asked),
        turns=asked.turns(),
        **asked.called(),
        is_parsed=True,
        prompt_field="input",
        max_tokens=asked.max_output_tokens,
        has_logprobs=asked.has_logprobs,
        top_logprobs=asked.top_logprobs if asked.has_logprobs else None,
        form=asked.text.form(),
    )
    form = ResponsesForm(request.state.request_id, state.tokenizer, asked.has_logprobs, asked.echoed())
    return await respond(request, state.generation, spec, form, asked.stream)
