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
    """A text that answers the input."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputTextAnswer]


class ReasoningTextAnswer(TypedDict):
    """The text of the reasoning."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItemAnswer(TypedDict):
    """The reasoning that the answer begins with; it is not summed up."""

    id: str
    type: Literal["reasoning"]
    status: Literal["in_progress", "completed", "incomplete"]
    summary: list[str]
    content: list[ReasoningTextAnswer]


class FunctionCallAnswer(TypedDict):
    """A call of a function; `arguments` is the text of a JSON object, empty while it is in progress."""

    id: str
    type: Literal["function_call"]
    status: Literal["in_progress", "completed"]
    call_id: str
    name: str
    arguments: str


OutputItemAnswer = ReasoningItemAnswer | OutputMessageAnswer | FunctionCallAnswer


class FunctionToolAnswer(TypedDict):
    """A function that could be called, as it was asked for."""

    type: Literal["function"]
    name: str
    description: str | None
    parameters: dict[str, Any] | None
    strict: bool


class NamedFunctionAnswer(TypedDict):
    """The function that had to be called."""

    type: Literal["function"]
    name: str


class InputTokens(CachedTokens):
    """Tokens of the input that were not computed anew; none is kept on purpose."""

    cache_write_tokens: Literal[0]


class OutputTokens(TypedDict):
    """Tokens of the output; those of reasoning are not counted apart."""

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
    output: list[OutputItemAnswer]
    parallel_tool_calls: bool
    previous_response_id: None
    store: Literal[False]
    temperature: float
    text: TextConfigAnswer
    tool_choice: Literal["none", "auto", "required"] | NamedFunctionAnswer
    tools: list[FunctionToolAnswer]
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
    """An item, when it begins and once it is whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItemAnswer


class _ItemEvent(_Event):
    item_id: str
    output_index: int


class _TextEvent(_ItemEvent):
    content_index: int


class ContentPartEvent(_TextEvent):
    """The only part of a message or of reasoning, empty and whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputTextAnswer | ReasoningTextAnswer


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


class ReasoningDeltaEvent(_TextEvent):
    """The next piece of the reasoning."""

    type: Literal["response.reasoning_text.delta"]
    delta: str


class ReasoningDoneEvent(_TextEvent):
    """The reasoning, once it is whole."""

    type: Literal["response.reasoning_text.done"]
    text: str


class ArgumentsDeltaEvent(_ItemEvent):
    """The arguments of a call."""

    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_ItemEvent):
    """The arguments of a call, once they are whole."""

    type: Literal["response.function_call_arguments.done"]
    arguments: str


EVENTS = (
    ResponseEvent,
    OutputItemEvent,
    ContentPartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
)
