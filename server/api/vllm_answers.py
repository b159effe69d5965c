"""Answers in vLLM's shape, as the OpenAPI document describes them; see `answers`."""

from __future__ import annotations

from typing_extensions import TypedDict  # of `typing` is not enough for Pydantic before Python 3.12


class TokensAnswer(TypedDict):
    """The tokens of a prompt; `token_strs` are the tokenizer's own names of them, null unless asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TextAnswer(TypedDict):
    """The text of tokens."""

    prompt: str


class ServerVersionAnswer(TypedDict):
    """The version of this server."""

    version: str
