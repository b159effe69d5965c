"""Bound the bytes of text that so many tokens can stand for: longer texts are refused before they are tokenised."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from tokenizers import models

KEEPING = ("ByteLevel", "Split", "Digits", "Punctuation")  # pre-tokenizers that only cut, unless told to remove
GENEROUS_BYTES, GENEROUS_TIMES = 2**20, 4  # of a text that may be dropped, or whose characters may become one
SPACE = "▁"  # that SentencePiece writes for a space, and before a text


@dataclass(frozen=True)
class TextBound:
    """The bytes of the longest token, and which text no token stands for.

    With `is_sure` every byte of a text is in a token, but for those of `dropped`, which the vocabulary lacks, and for
    white space if `drops_space`.
    """

    longest: int
    is_sure: bool
    dropped: bytes = b""
    drops_space: bool = False

    def excess(self, text: str, num_tokens: int) -> tuple[int, int] | None:
        """Return the bytes of a text that cannot fit so many tokens, and the most that can; None if it may fit.

        A bound that is sure is exact. Text that no token stands for has the generous bound, as all text has else.
        """
        most = num_tokens * self.longest
        generous = max(GENEROUS_BYTES, GENEROUS_TIMES * most)
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        if num_bytes > generous:
            return num_bytes, generous
        if num_bytes <= most or not self.is_sure or (num_held := self.num_held(text)) <= most:
            return None
        return num_held, most

    def num_held(self, text: str) -> int:
        """Count the bytes of a text that tokens must stand for."""
        held = "".join(text.split()) if self.drops_space else text
        return len(held.encode("utf-8", "surrogatepass").translate(None, self.dropped))


def text_bound(tokenizer: Any) -> TextBound:
    """Find the bound of a tokenizer.

    It is sure of byte-level BPE, and of SentencePiece's BPE with a piece for every byte, if nothing before the model
    drops or joins characters: no normalizer that shortens, no pre-tokenizer that removes.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    drops_space = any(token.lstrip or token.rstrip for token in added.values())
    if backend is not None and isinstance(backend.model, models.BPE):
        if backend.normalizer is None and _is_byte_level(backend.pre_tokenizer):
            pieces = (len(piece.encode() if piece in added else piece) for piece in tokenizer.get_vocab())
            return TextBound(max(pieces), True, bytes(_missing_bytes(backend)), drops_space)
        if backend.model.byte_fallback and _has_bytes(backend) and _is_sentencepiece(backend):
            return TextBound(_longest(tokenizer), True, drops_space=drops_space)
    return TextBound(_longest(tokenizer), False)


def characters_of_bytes() -> dict[int, str]:
    """Map each byte to the character that byte-level pieces have for it."""
    characters: dict[int, str] = import_module("transformers.convert_slow_tokenizer").bytes_to_unicode()
    return characters


def _longest(tokenizer: Any) -> int:
    return max(len(piece.replace(" ", SPACE).encode()) for piece in tokenizer.get_vocab())


def _is_byte_level(pre_tokenizer: Any) -> bool:
    """Tell whether a text is cut into bytes, and nothing of it is removed."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    are_keeping = all(step["type"] in KEEPING and step.get("behavior") != "Removed" for step in steps)
    return are_keeping and any(step["type"] == "ByteLevel" for step in steps)


def _missing_bytes(backend: Any) -> Iterator[int]:
    """Give the bytes that the vocabulary lacks: they are dropped, or become its unknown token."""
    return (byte for byte, character in characters_of_bytes().items() if backend.token_to_id(character) is None)


def _has_bytes(backend: Any) -> bool:
    """Tell whether there is a piece for every byte, so that nothing is unknown."""
    return all(backend.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))


def _is_sentencepiece(backend: Any) -> bool:
    """Tell whether nothing is done to a text but that spaces are written as SentencePiece does."""
    normalizers, steps = _steps(backend.normalizer, "normalizers"), _steps(backend.pre_tokenizer, "pretokenizers")
    return all(
        step["type"] == "Prepend"
        or (step["type"] == "Replace" and (step["pattern"], step["content"]) == ({"String": " "}, SPACE))
        for step in normalizers
    ) and all(step["type"] == "Metaspace" and step["replacement"] == SPACE for step in steps)


def _steps(part: Any, key: str) -> list[dict[str, Any]]:
    """List the steps of a normalizer or a pre-tokenizer, as its file has them."""
    if part is None:
        return []
    state = json.loads(part.__getstate__())
    return list(state.get(key, [state]))
