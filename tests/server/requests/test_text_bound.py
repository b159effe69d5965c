"""The bound of a text's bytes: by no kind of tokenizer is a text refused that fits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from server.requests.text_bound import TextBound, characters_of_bytes, text_bound
from server.requests.tokenizer import Tokenizer
from tests.kit.tokenizers import KINDS, byte_level, save_tokenizer, sentencepiece

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
}
SURE = ("bytes", "byte_level", "few_bytes", "digits", "stripping", "sentencepiece", "metaspace")


def few_bytes() -> Any:
    """A byte-level tokenizer whose vocabulary lacks bytes, as SmolLM2's does: they are dropped."""
    made = byte_level()
    state = json.loads(made.to_str())
    lacking = {character for byte, character in characters_of_bytes().items() if byte in b"\x04\x06\xf1\xf5\xfe"}
    model = state["model"]
    model["vocab"] = {piece: number for piece, number in model["vocab"].items() if not lacking & {*piece}}
    model["merges"] = [merge for merge in model["merges"] if not lacking & {*"".join(merge)}]
    return type(made).from_str(json.dumps(state))


def digits() -> Any:
    """A byte-level tokenizer behind one that takes digits apart."""
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), made.pre_tokenizer])
    return made


def stripping() -> Any:
    """A byte-level tokenizer with an added token that takes the white space beside it, as Phi-3's."""
    made = byte_level()
    made.add_tokens([AddedToken("<x>", lstrip=True, rstrip=True)])
    return made


def metaspace() -> Any:
    """A tokenizer as Llama 2's that writes spaces by its pre-tokenizer."""
    made = sentencepiece()
    made.normalizer, made.pre_tokenizer = None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made


MADE: dict[str, Callable[[], Any]] = {
    **KINDS, "few_bytes": few_bytes, "digits": digits, "stripping": stripping, "metaspace": metaspace,
}  # fmt: skip


def made_of(kind: str, folder: Path) -> tuple[Callable[[str], list[int]], TextBound]:
    """A tokenizer of a kind, as a function, and its bound."""
    if kind == "bytes" or kind in KINDS:
        tokenizer = Tokenizer(save_tokenizer(kind, folder))
        return tokenizer.encode, tokenizer._bound
    fast = PreTrainedTokenizerFast(tokenizer_object=MADE[kind]())
    return lambda text: list(fast(text)["input_ids"]), text_bound(fast)


@pytest.mark.parametrize("kind", ["bytes", *MADE])
def test_a_text_that_fits_is_never_too_long(tmp_path_factory: pytest.TempPathFactory, kind: str) -> None:
    """Whatever text: what so many tokens stand for fits so many tokens."""
    encode, bound = made_of(kind, tmp_path_factory.mktemp(kind))
    assert bound.is_sure == (kind in SURE)
    pieces = [
        " " * 60,
        "\n",
        "card arrival",
        "🎩" * 9,
        "</s>",
        "e\u0301",
        "x",
        "\x04" * 40,
        "\U00040000",
        "<x>",
        "▁▁",
        "123",
    ]

    @settings(max_examples=60, deadline=None)
    @given(text=st.one_of(st.lists(st.sampled_from(pieces), max_size=9).map("".join), st.text(max_size=30)))
    def holds(text: str) -> None:
        num_tokens = len(encode(text))
        assert bound.excess(text, num_tokens) is None
        assert not bound.is_sure or bound.num_held(text) <= num_tokens * bound.longest

    holds()
    for long in (" " * 100_000, "<x>" + " " * 100_000, "\x04" * 100_000):
        assert bound.excess(long, len(encode(long))) is None


@pytest.mark.parametrize("kind", SURE)
def test_a_text_that_cannot_fit_is_refused(tmp_path: Path, kind: str) -> None:
    """A text of one byte more than so many of the longest tokens have is refused, where the bound is sure."""
    _, bound = made_of(kind, tmp_path)
    most = 8 * bound.longest
    assert bound.excess("x" * most, 8) is None
    assert bound.excess("x" * (most + 1), 8) == (most + 1, most)


@pytest.mark.real_base
def test_the_base_of_the_examples_is_bound_tightly(real_base: Path) -> None:
    """SmolLM2's tokenizer, which lacks bytes, is sure of its bound: 81 bytes a token."""
    bound = Tokenizer(real_base)._bound
    assert (bound.is_sure, bound.longest) == (True, 81) and b"\x04" in bound.dropped
    assert bound.excess("x" * (8192 * 81 + 1), 8192) is not None


@pytest.mark.parametrize("change", [None, *CHANGES])
def test_only_what_keeps_every_byte_is_sure(change: str | None) -> None:
    """The bound is sure for a byte-level tokenizer, and for none that drops or joins something before its bytes."""
    made = byte_level()
    if change is not None:
        CHANGES[change](made)
    assert text_bound(PreTrainedTokenizerFast(tokenizer_object=made)).is_sure == (change is None)
