"""The bound of a text's bytes: by no kind of tokenizer is a text refused that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.requests.longest_token import longest_token
from server.requests.tokenizer import GENEROUS_BYTES, Tokenizer
from tests.kit.tokenizers import KINDS, byte_level, save_tokenizer

SPLIT = Regex(" +")
CHANGES: dict[str, Callable[[Any], Any]] = {  # of a byte-level tokenizer, after which a token may stand for any text
    "a normalizer": lambda made: setattr(made, "normalizer", normalizers.NFC()),
    "white space that is removed": lambda made: setattr(
        made,
        "pre_tokenizer",
        pre_tokenizers.Sequence([pre_tokenizers.Split(SPLIT, "removed"), made.pre_tokenizer]),
    ),
    "a pre-tokenizer that removes": lambda made: setattr(
        made, "pre_tokenizer", pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), made.pre_tokenizer])
    ),
    "no pre-tokenizer": lambda made: setattr(made, "pre_tokenizer", None),
    "an added token that takes white space": lambda made: made.add_tokens([AddedToken("<x>", rstrip=True)]),
}


@pytest.mark.parametrize("kind", ["bytes", *KINDS])
def test_a_text_that_fits_is_never_too_long(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    """Whatever text: it has no more bytes than so many tokens are said to hold at most."""
    tokenizer = Tokenizer(save_tokenizer(kind, tmp_path_factory.mktemp(kind)))
    assert tokenizer.max_bytes(8) < GENEROUS_BYTES if kind in ("bytes", "byte_level") else True

    @settings(max_examples=60, deadline=None)
    @given(
        parts=st.lists(st.sampled_from([" " * 60, "\n", "card arrival", "🎩" * 9, "</s>", "e\u0301", "x"]), max_size=9)
    )
    def holds(parts: list[str]) -> None:
        text = "".join(parts)
        assert len(text.encode()) <= tokenizer.max_bytes(len(tokenizer.encode(text)))

    holds()
    spaces = " " * 100_000
    assert len(spaces) <= tokenizer.max_bytes(max(1, len(tokenizer.encode(spaces))))


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_only_what_keeps_every_byte_is_sure(change: str | None) -> None:
    """The bound is sure for a byte-level tokenizer, and for none that drops or joins something before its bytes."""
    made = byte_level()
    if change is not None:
        CHANGES[change](made)
    _, is_bound = longest_token(PreTrainedTokenizerFast(tokenizer_object=made))
    assert is_bound == (change is None)
