"""Structs of an artifact's `manifest.json`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import msgspec

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Word = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
MAX_LABEL_CHARS = 1000
Label = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_LABEL_CHARS)]
Turn = tuple[str, str]  # role, content
ToolFormatName = Literal["hermes", "qwen3_coder", "llama3", "mistral", "mistral_v11", "pythonic", "json"]
AroundText = Annotated[str, msgspec.Meta(max_length=4096)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Around(msgspec.Struct, forbid_unknown_fields=True):
    """Plain text before and after a role's message."""

    before: str = ""
    after: str = ""


class PromptFormat(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The chat format that an adapter was trained on: plain text around each role, never a template language.

    `begin` starts the prompt, `generation` ends it, before the answer. `lead` is the text, a space mostly, that was
    trained between the prompt and each answer, and is no part of it.
    """

    begin: str = ""
    system: Around = msgspec.field(default_factory=Around)
    user: Around = msgspec.field(default_factory=Around)
    assistant: Around = msgspec.field(default_factory=Around)
    generation: str = ""
    lead: str = ""

    def parts(self, turns: Sequence[Turn]) -> Iterator[tuple[str, str | None]]:
        """Yield the parts of the prompt that the answer follows, each with the role that wrote it; None: the format."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        yield self.begin, None
        for role, text in turns:
            yield around[role].before + (self.lead if role == "assistant" else ""), None
            yield text, role
            yield around[role].after, None
        yield self.generation, None


class ToolTexts(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """Plain text around the tools that an adapter may call, never a template language.

    `before_tools` stands before the functions, one JSON object a line, at the end of the system turn. Around each call,
    `{"name": …, "arguments": {…}}`, stand `call_begin` and `call_end`, and around each result, in a user's turn, the
    last two. Without a `call_begin` an answer that calls has nothing but calls.
    """

    before_tools: AroundText = ""
    call_begin: AroundText = ""
    call_end: AroundText = ""
    result_begin: AroundText = ""
    result_end: AroundText = ""


class ReasoningTexts(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """Plain text around an answer's reasoning; without `before` every answer begins with it."""

    after: Annotated[str, msgspec.Meta(pattern=r"\S", max_length=4096)]
    before: AroundText = ""


class BaseRef(msgspec.Struct, forbid_unknown_fields=True):
    """The base that an artifact was trained on: its name, and its digests as in `base.identity.BaseIdentity`."""

    name: Word
    identity: Digest
    weights: Digest


class ParityCase(msgspec.Struct, forbid_unknown_fields=True):
    """The trainer's output for a prompt: its best (token, logit) pairs, best first, and its greedy continuation."""

    prompt_token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=8192)]
    top: Annotated[list[tuple[TokenId, float]], msgspec.Meta(min_length=1, max_length=100)]
    continuation: Annotated[list[TokenId], msgspec.Meta(max_length=256)]


class GenerationDefaults(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """Sampling of an artifact's answers if the request names none; None: the route's own default."""

    temperature: Annotated[float, msgspec.Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, msgspec.Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(ge=0.01, le=10)] | None = None
    presence_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, msgspec.Meta(ge=-2, le=2)] | None = None
    stop_token_ids: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=256)] | None = None


class TaskForm(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, frozen=True):
    """The form of an artifact's answers if the request names none: one of some labels, or JSON that fits a schema."""

    labels: Annotated[tuple[Label, ...], msgspec.Meta(min_length=1, max_length=4096)] | None = None
    schema: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if (self.labels is None) == (self.schema is None):
            raise ValueError("a form has either labels or a schema")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("a form lists each label once")


class Manifest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """The trainer's record of an artifact. `training` and `evaluation` are free-form facts for people.

    `ends` are the tokens that it was trained to end an answer with; the server stops at them as at the base's own.
    `rotary` names the base's rotary factors in training, if they change with length (see `rotary_choice`). `tools` is
    the format in which it writes calls of tools, by name or as texts, and `reasoning` has the texts around reasoning.
    """

    format_version: int
    method: Word
    base: BaseRef
    prompt_format: PromptFormat | None = None
    ends: Annotated[list[TokenId], msgspec.Meta(max_length=64)] = []
    rotary: Annotated[str, msgspec.Meta(max_length=200)] = ""
    generation: GenerationDefaults | None = None
    form: TaskForm | None = None
    tools: ToolFormatName | ToolTexts | None = None
    reasoning: ReasoningTexts | None = None
    parity: Annotated[list[ParityCase], msgspec.Meta(max_length=64)] = []
    training: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
