"""A generation request as a route hands it on: plain values, nothing resolved, nothing encoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from adapters_store.registry.tenants import TenantLimits
from adapters_store.tools.turns import AnyTurn, Tools
from server.core import AskedForm, Sampling


@dataclass(frozen=True)
class GenerationSpec:
    """A generation that one caller asks for, or scores. Exactly one of `texts`, `turns` and `token_ids` is given.

    `prompt_field` is the name of that one in the request's body, for errors.

    `task` is a name or `base`; if `adapters` lists (task, weight) pairs, these are composed and `task` is not read.
    `max_tokens` None means the rest of the context, or what an answer may have. `sampling` lacks `max_tokens` and
    `logprobs`, which follow from the other fields: `top_logprobs` (alternatives a token) is valid only with
    `has_logprobs`. `named` are the fields that the request named: of the others, the adapters' own defaults count. With
    `echo` or `prompt_logprobs` (alternatives a token) the answers tell their prompts. `continuations` of one prompt are
    scored, each behind it as in one text. With `has_special` texts are encoded with the tokenizer's own special tokens
    around them. `form` None is that of the adapters, if they carry one; with `label_probs` it lists labels, and answers
    tell how probable each is. `tools` are functions that an answer to `turns` may call, one alone unless `is_parallel`,
    and must call if `must_call` is a name, or empty for any of them; `parameters_field` is the place of a schema in a
    tool of the request's body, for errors. If `is_strict` calls fit the functions' schemas, as they do if there must be
    one. Answers are cut into content, reasoning and calls if `is_parsed`.
    """

    tenant: str
    limits: TenantLimits
    task: str
    sampling: Sampling
    max_tokens: int | None
    version: int | None = None
    adapters: list[tuple[str, float]] | None = None
    user: str | None = None
    texts: list[str] | None = None
    turns: Sequence[AnyTurn] | None = None
    tools: Tools = ()
    parameters_field: str = "function.parameters"
    must_call: str | None = None
    is_strict: bool = False
    is_parallel: bool = True
    is_parsed: bool = False
    token_ids: list[list[int]] | None = None
    prompt_field: str = "prompt"
    n: int = 1
    stop: list[str] = field(default_factory=list)
    has_logprobs: bool = False
    top_logprobs: int | None = None
    has_special: bool = True
    timeout_s: float = 120.0
    named: frozenset[str] = frozenset()
    echo: bool = False
    prompt_logprobs: int | None = None
    continuations: list[str | list[int]] | None = None
    form: AskedForm | None = None
    label_probs: bool = False

    @property
    def has_held_calls(self) -> bool:
        """Whether a grammar holds the calls of the answers to the functions' schemas."""
        return bool(self.tools) and (self.must_call is not None or self.is_strict)
