"""Encode text to token ids and decode them, by the base's tokenizer and chat template."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from adapters_store.base.turns import Rendered, TurnEncoder
from server.requests.text_bound import characters_of_bytes, text_bound
from server.requests.without_torch import import_transformers

REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to
BYTE_PIECE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece's piece of a single byte


class Tokenizer:
    """A base's tokenizer and chat template.

    With `has_control_prompts` the name of a control token in a prompt is that token, else it is text as in a turn.
    """

    def __init__(self, folder: Path, *, has_control_prompts: bool = True) -> None:
        self._tokenizer: Any = import_transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
        added = self._tokenizer.added_tokens_decoder
        self._special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        self._special = frozenset(self._special_ids.values())
        self._bound = text_bound(self._tokenizer)
        self._word = self._tokenizer("a", add_special_tokens=False)[
            "input_ids"
        ]  # a token stands behind it as in a text
        self._byte_of = {character: byte for byte, character in characters_of_bytes().items()}  # of byte-level pieces
        self.turns, self._has_control_prompts = TurnEncoder(self._tokenizer), has_control_prompts
        self.encode("")  # the first call may set up the tokenizer, which threads must not do at once

    @property
    def has_chat_template(self) -> bool:
        """Whether the base says how chat turns are written."""
        return bool(self._tokenizer.chat_template)

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text, if the tokenizer names one."""
        token_id: int | None = self._tokenizer.eos_token_id
        return token_id

    def special_id(self, text: str) -> int | None:
        """The special token that is written as `text`, or None."""
        return self._special_ids.get(text)

    def excess(self, text: str, num_tokens: int) -> tuple[int, int] | None:
        """The bytes of a text that cannot fit so many tokens, and the most that can; None if it may fit."""
        return self._bound.excess(text, num_tokens)

    def encode(self, text: str, has_special: bool = True) -> list[int]:
        """Tokens of a prompt, by default with the tokenizer's own special ones around it. Raises `ControlTextError`."""
        if not self._has_control_prompts:
            return self.turns.encode(self.turns.render_text(text, "user", has_special=has_special))
        encoded = self._tokenizer(text, add_special_tokens=has_special, verbose=False)  # or it logs that one is long
        ids: list[int] = encoded["input_ids"]
        return ids

    def encode_behind(self, text: str) -> list[int]:
        """Tokens of a text that goes on behind another one. Raises `ControlTextError`."""
        return self.turns.encode(Rendered(("", text), has_special=False))

    def token_name(self, token_id: int) -> str:
        """The tokenizer's own name of a token, as its vocabulary has it."""
        name: str | None = self._tokenizer.convert_ids_to_tokens(token_id)
        return name or ""

    def token_text(self, token_id: int) -> str:
        """The text of a token as it stands within a text, with the space that it begins with; a special one's name."""
        if token_id in self._special:
            return self.decode([token_id], skip_special=False)
        before = self.decode(self._word)
        text = self.decode([*self._word, token_id])
        return text[len(before) :] if text.startswith(before) else self.decode([token_id])

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a token's text in UTF-8, also of one that is a part of a character."""
        text = self.token_text(token_id)
        piece = self.token_name(token_id)
        if REPLACEMENT not in text:
            return text.encode()
        if fallback := BYTE_PIECE.fullmatch(piece):
            return bytes([int(fallback[1], 16)])
        is_byte_level = all(character in self._byte_of for character in piece)
        return bytes(self._byte_of[character] for character in piece) if is_byte_level else text.encode()

    def is_special(self, token_id: int) -> bool:
        """Whether a token has no text of its own, as the end of a sequence."""
        return token_id in self._special

    def decode(self, token_ids: list[int], skip_special: bool = True) -> str:
        """The text of token ids; special tokens have none, unless `skip_special` is False."""
        text: str = self._tokenizer.decode(
            token_ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return text
