"""Answers of OpenAI's responses, as the OpenAPI document describes them; see `answers`."""

from __future__ import annotations

from typing import Any, Literal, NotRequired

from typing_extensions import TypedDict  # of `typing` is not enough for Pydantic before Python 3.12

from server.api.openai_answers import CachedTokens, ChosenChatToken

ResponseStatus = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputTextAnswer(TypedDict):
    """The text of a message; `logprobs` are there if they were asked for."""

    type: Literal["output_text"]
    text: str
    annotations: list[str]
    logprobs: list[ChosenChatToken]


class OutputMessageAnswer(TypedDict):
    """The message that answers the input."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputTextAnswer]


class InputTokens(CachedTokens):
    """Tokens of the input that were not computed anew; none is kept on purpose."""

    cache_write_tokens: Literal[0]


class OutputTokens(TypedDict):
    """Tokens of the output; none is reasoning."""

    reasoning_tokens: Literal[0]


class ResponseUsageAnswer(TypedDict):
    """Tokens of a response; `virtual_tokens` are beside."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int
    virtual_tokens: int


class ResponseErrorAnswer(TypedDict):
    """The error that ended a response; `type` is its code as other routes tell it."""

    code: Literal["server_error", "rate_limit_exceeded"]
    type: str
    message: str
    param: str | None
    request_id: str


class IncompleteAnswer(TypedDict):
    """The reason why a response is cut."""

    reason: Literal["max_output_tokens"]


class TextFormatAnswer(TypedDict):
    """The format of a response's text, as it was asked for."""

    type: Literal["text", "json_object", "json_schema"]
    name: NotRequired[str]
    description: NotRequired[str | None]
    schema: NotRequired[dict[str, Any]]
    strict: NotRequired[bool | None]
    value: NotRequired[dict[str, Any] | None]


class TextConfigAnswer(TypedDict):
    """The way in which a response's text is written."""

    format: TextFormatAnswer


class ResponseAnswer(TypedDict):
    """A response: what was asked for, and the output; nothing of it is stored."""

    id: str
    object: Literal["response"]
    created_at: int
    status: ResponseStatus
    background: Literal[False]
    error: ResponseErrorAnswer | None
    incomplete_details: IncompleteAnswer | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessageAnswer]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    text: TextConfigAnswer
    tool_choice: Literal["auto"]
    tools: list[str]
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsageAnswer | None
    user: str | None


class _Event(TypedDict):
    sequence_number: int


class ResponseEvent(_Event):
    """The response, when it begins and ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseAnswer


class OutputItemEvent(_Event):
    """The message, before its text and after it."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputMessageAnswer


class _TextEvent(_Event):
    item_id: str
    output_index: int
    content_index: int


class ContentPartEvent(_TextEvent):
    """The message's only part, empty and whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputTextAnswer


class TextDeltaEvent(_TextEvent):
    """The next piece of the text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[ChosenChatToken]


class TextDoneEvent(_TextEvent):
    """The text, once it is whole."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[ChosenChatToken]


EVENTS = (ResponseEvent, OutputItemEvent, ContentPartEvent, TextDeltaEvent, TextDoneEvent)
