"""Bound the bytes of text that a token can stand for: longer texts are refused before they are tokenised."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import models, pre_tokenizers

KEEPING = ("ByteLevel", "Split", "Digits", "Punctuation")  # pre-tokenizers that only cut, unless told to remove


def longest_token(tokenizer: Any) -> tuple[int, bool]:
    """Return the bytes of the longest token, and whether no token stands for more of a text than it has bytes.

    That is sure of byte-level BPE, which has a piece for every byte, if nothing before it drops or joins characters: no
    normalizer, no pre-tokenizer that removes, no added token that takes the white space beside it.
    """
    added = {token.content: token for token in tokenizer.added_tokens_decoder.values()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_bound = (
        backend is not None
        and isinstance(backend.model, models.BPE)
        and backend.normalizer is None
        and _is_byte_level(backend.pre_tokenizer)
        and all(backend.token_to_id(byte) is not None for byte in pre_tokenizers.ByteLevel.alphabet())
        and not any(token.lstrip or token.rstrip for token in added.values())
    )
    pieces = (len(piece) if is_bound and piece not in added else len(piece.encode()) for piece in tokenizer.get_vocab())
    return max(pieces), is_bound


def _is_byte_level(pre_tokenizer: Any) -> bool:
    """Tell whether a text is cut into bytes, and nothing of it is removed."""
    if pre_tokenizer is None:
        return False
    state = json.loads(pre_tokenizer.__getstate__())
    steps = state.get("pretokenizers", [state])
    are_keeping = all(step["type"] in KEEPING and step.get("behavior") != "Removed" for step in steps)
    return are_keeping and any(step["type"] == "ByteLevel" for step in steps)
