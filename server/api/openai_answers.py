"""Answers in OpenAI's shape, as the OpenAPI document describes them; see `answers`."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # of `typing` is not enough for Pydantic before Python 3.12

from server.api.answers import CallFinishReason, FinishReason, ToolCallAnswer


class ModelAnswer(TypedDict):
    """A task as a model, a version of one, or the base.

    `root` is the task, or the name of the base; `parent` is `base`, null of the base itself; `max_model_len` is the
    most tokens of prompt and answer, null while no engine is ready.
    """

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None


class ModelsAnswer(TypedDict):
    """A page of models; the last one's `id` is the `after` of the next page."""

    object: Literal["list"]
    data: list[ModelAnswer]
    has_more: bool


class CachedTokens(TypedDict):
    """Tokens of the prompt that were not computed anew."""

    cached_tokens: int


class OpenAIUsage(TypedDict):
    """Tokens of a request in OpenAI's words; `virtual_tokens` are beside."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    virtual_tokens: int


class CompletionLogprobs(TypedDict):
    """OpenAI's older form of log-probabilities: parallel lists; null for the first token of an echoed prompt."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A completion that is whole."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: CompletionLogprobs | None


class CompletionDelta(TypedDict):
    """A completion's next piece."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None


class _Head(TypedDict):
    id: str
    created: int
    model: str


class CompletionAnswer(_Head):
    """The completions of all prompts, in order."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: OpenAIUsage


class CompletionEvent(_Head):
    """The next piece of a completion; `usage` is there if it was asked for, null but in the last."""

    object: Literal["text_completion"]
    choices: list[CompletionDelta]
    usage: NotRequired[OpenAIUsage | None]


class ChatToken(TypedDict):
    """A token with its log-probability and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenChatToken(ChatToken):
    """The chosen token, with the best ones at its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(TypedDict):
    """OpenAI's newer form of log-probabilities."""

    content: list[ChosenChatToken]
    refusal: None


class CalledFunctionDelta(TypedDict):
    """The next piece of a call: its name, and then its arguments."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The next piece of the call `index`; the first has its id."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: CalledFunctionDelta


class AssistantMessage(TypedDict):
    """The assistant's whole turn; `content` is null if it has none but calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallAnswer]]


class AssistantDelta(TypedDict):
    """The turn's next piece, of content, reasoning or calls; the first has the role."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChoice(TypedDict):
    """A whole answer to the turns."""

    index: int
    message: AssistantMessage
    finish_reason: CallFinishReason
    logprobs: ChatLogprobs | None


class ChatDelta(TypedDict):
    """An answer's next piece."""

    index: int
    delta: AssistantDelta
    finish_reason: CallFinishReason | None
    logprobs: ChatLogprobs | None


class ChatAnswer(_Head):
    """The answers to the turns."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: OpenAIUsage


class ChatEvent(_Head):
    """The next piece of an answer; `usage` is there if it was asked for, null but in the last."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatDelta]
    usage: NotRequired[OpenAIUsage | None]
