"""The structs of an artifact's `manifest.json`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
Word = Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
TokenId = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]


class Around(msgspec.Struct, forbid_unknown_fields=True):
    """Plain text before and after what a role says."""

    before: str = ""
    after: str = ""


class PromptFormat(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """How the adapter was trained to see chat turns: plain text around each role, never a template language."""

    begin: str = ""
    system: Around = msgspec.field(default_factory=Around)
    user: Around = msgspec.field(default_factory=Around)
    assistant: Around = msgspec.field(default_factory=Around)
    generation: str = ""

    def render(self, turns: list[tuple[str, str]]) -> str:
        """The prompt of (role, text) turns, ready for the answer."""
        around = {"system": self.system, "user": self.user, "assistant": self.assistant}
        texts = (around[role].before + text + around[role].after for role, text in turns)
        return self.begin + "".join(texts) + self.generation


class BaseRef(msgspec.Struct, forbid_unknown_fields=True):
    """The base that an artifact was trained on: its name, and the digests of `bases.base_identity`."""

    name: Word
    identity: Digest
    weights: Digest


class ParityCase(msgspec.Struct, forbid_unknown_fields=True):
    """A prompt, the trainer's own best (token, logit) after it, best first, and its greedy continuation."""

    prompt_token_ids: Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=8192)]
    top: Annotated[list[tuple[TokenId, float]], msgspec.Meta(min_length=1, max_length=100)]
    continuation: Annotated[list[TokenId], msgspec.Meta(max_length=256)]


class Manifest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What training says of an artifact. `training` and `evaluation` are facts for people."""

    format_version: int
    method: Word
    base: BaseRef
    prompt_format: PromptFormat | None = None
    parity: Annotated[list[ParityCase], msgspec.Meta(max_length=64)] = []
    training: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}
