"""The text and the bytes of tokens, by every kind of tokenizer: they are those that stand in the whole text."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.api.openai_form import CompletionForm
from server.core import Logprobs
from server.requests.detokenizer import TextStream
from server.requests.tokenizer import REPLACEMENT, Tokenizer
from tests.kit.tokenizers import KINDS, save_tokenizer

TEXTS = st.text(st.sampled_from([*"the card is new ,.?é", *"🎩 ", *"xyz<|/>"]), max_size=40)


@pytest.fixture(scope="module", params=["bytes", *KINDS])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer of each kind."""
    return Tokenizer(save_tokenizer(request.param, tmp_path_factory.mktemp(request.param)))


def plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of a text that have a text of their own, behind a word."""
    return [token for token in tokenizer.encode(f"the{text}") if not tokenizer.is_special(token)]


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, share=st.floats(0, 1))
def test_an_answer_is_the_rest_of_the_text(tokenizer: Tokenizer, text: str, share: float) -> None:
    """What is streamed behind a prompt is what the whole text has behind it, its first space and all."""
    tokens = plain(tokenizer, text)
    cut = 1 + int(share * (len(tokens) - 1))
    before, whole = tokenizer.decode(tokens[:cut]), tokenizer.decode(tokens)
    if before.endswith(REPLACEMENT):
        return  # the prompt ends within a character
    stream = TextStream(tokenizer, [], tokens[:cut])
    pieces = [*map(stream.push, tokens[cut:]), stream.flush()]
    assert before + "".join(pieces) == whole
    assert b"".join(map(tokenizer.token_bytes, tokens[cut:])) == "".join(pieces).encode()


def test_every_token_has_a_name_of_its_own(tokenizer: Tokenizer) -> None:
    """Among all tokens of a vocabulary none is lost to another of the same text, and the chosen one keeps its own."""
    form = CompletionForm("id", "base", tokenizer, True, False, texts=None, n=1)
    every = range(len(tokenizer._tokenizer))
    for chosen in every:
        near = [(token, -1.0 - token) for token in {*every[:40], *every[chosen : chosen + 20], *every[-9:]}]
        tops = form._tops(chosen, Logprobs(-0.5, near))
        assert len(tops) == len({chosen, *(token for token, _ in near)})
        assert tops[form._name(chosen)] == -0.5


def test_a_part_of_a_character_has_its_bytes(tokenizer: Tokenizer) -> None:
    """The bytes of the tokens that make up a character are the character's."""
    tokens = [token for token in plain(tokenizer, "🎩") if tokenizer.token_text(token).count(REPLACEMENT)]
    assert b"".join(map(tokenizer.token_bytes, tokens)) in ("🎩".encode(), b"")
