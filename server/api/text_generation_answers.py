"""Answers in the form of LoRAX and TGI, as the OpenAPI document describes them; see `answers`."""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict  # of `typing` is not enough for Pydantic before Python 3.12

from server.api.answers import ErrorFacts

EndReason = Literal["length", "eos_token", "stop_sequence"]


class PromptTokenAnswer(TypedDict):
    """A token of the prompt; nothing predicts the first one, whose log-probability is null."""

    id: int
    text: str
    logprob: float | None


class AlternativeTokenAnswer(TypedDict):
    """A token that LoRAX's `return_k_alternatives` asks for."""

    id: int
    text: str
    logprob: float


class GeneratedTokenAnswer(AlternativeTokenAnswer):
    """A token of the answer; the text of a `special` one is no part of the whole text. `skipped` is LoRAX's."""

    special: bool
    skipped: Literal[False]
    alternative_tokens: NotRequired[list[AlternativeTokenAnswer]]


class _Details(TypedDict):
    finish_reason: EndReason
    prompt_tokens: int
    generated_tokens: int
    seed: int | None


class TextGenerationDetails(_Details):
    """The details of a whole answer; `seed` is null of one that was not sampled."""

    skipped_tokens: Literal[0]
    prefill: list[PromptTokenAnswer]
    tokens: list[GeneratedTokenAnswer]
    top_tokens: NotRequired[list[list[GeneratedTokenAnswer]]]


class TextGenerationAnswer(TypedDict):
    """A whole answer; `details` are there if they were asked for."""

    generated_text: str
    details: NotRequired[TextGenerationDetails]


class TextGenerationStreamDetails(_Details):
    """The details of a streamed answer; `input_length` is TGI's name of `prompt_tokens`."""

    input_length: int


class TextGenerationEvent(TypedDict):
    """The next token of an answer, counted from 1; the last has the whole text, and details if they were asked for."""

    index: int
    token: GeneratedTokenAnswer
    top_tokens: NotRequired[list[GeneratedTokenAnswer]]
    generated_text: str | None
    details: TextGenerationStreamDetails | None


class TextGenerationError(ErrorFacts):
    """An error as clients of LoRAX and TGI read it; `error_type` is there if they have a word for it."""

    error: str
    error_type: NotRequired[Literal["validation", "overloaded", "generation"]]
