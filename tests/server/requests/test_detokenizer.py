"""Text out of tokens: the stream's pieces join to what the tokenizer says of all tokens at once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from server.requests.detokenizer import MAX_HELD_TOKENS, TextStream
from server.requests.tokenizer import Tokenizer
from tests.kit.tiny import EOS, PAD

BYTES = st.integers(0, 255)
HARD = st.sampled_from([*"🎩👩‍🚀é".encode(), *b"ab ", 0xFF, 0xF0, 0x80, EOS, PAD])
TOKENS = st.lists(st.one_of(BYTES, HARD), max_size=80)
STOPS = st.lists(st.text("ab é🎩", min_size=1, max_size=5), max_size=4)
SOUND = st.text("ab é🎩👩‍🚀", max_size=40).map(lambda text: [*text.encode()])


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer(tiny_base)


def streamed(tokenizer: Tokenizer, tokens: list[int], stop: list[str]) -> tuple[list[str], bool]:
    """The pieces of a stream, and whether a stop text ended it."""
    stream, pieces = TextStream(tokenizer, stop), []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.is_stopped:
            return pieces, True
    pieces.append(stream.flush())
    return pieces, stream.is_stopped


def whole(tokenizer: Tokenizer, tokens: list[int], stop: list[str]) -> tuple[str, bool]:
    """The slow twin: the text of all tokens, up to the first complete stop text."""
    text = tokenizer.decode(tokens)
    for end in range(len(text) + 1):
        starts = [at for at in (text[:end].find(one) for one in stop) if at >= 0]
        if starts:
            return text[: min(starts)], True
    return text, False


@settings(max_examples=400, deadline=None)
@given(tokens=TOKENS)
def test_pieces_join_to_the_whole(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """The joined pieces are the text of all tokens, also for bytes that are no characters."""
    pieces, _ = streamed(tokenizer, tokens, [])
    assert "".join(pieces) == tokenizer.decode(tokens)


@settings(max_examples=400, deadline=None)
@given(tokens=st.one_of(TOKENS, SOUND), stop=STOPS)
def test_pieces_end_at_the_first_stop(tokenizer: Tokenizer, tokens: list[int], stop: list[str]) -> None:
    """The pieces join to the text before the first stop text that is complete, and say so."""
    pieces, is_stopped = streamed(tokenizer, tokens, stop)
    assert ("".join(pieces), is_stopped) == whole(tokenizer, tokens, stop)


def test_a_character_comes_whole(tokenizer: Tokenizer) -> None:
    """The bytes of a character give no piece until the last has come."""
    pieces, _ = streamed(tokenizer, [*"a🎩b".encode()], [])
    assert pieces == ["a", "", "", "", "🎩", "b", ""]


def test_a_part_of_a_prompts_character_is_no_context(tokenizer: Tokenizer) -> None:
    """A prompt that ends within a character does not swallow the answer's first bytes."""
    stream = TextStream(tokenizer, [], [*"a🎩".encode()][:-1])
    assert stream.push(0xA9) + stream.flush() + stream.push(98) == "\ufffdb"


def test_what_may_be_a_stop_waits(tokenizer: Tokenizer) -> None:
    """Text that may begin a stop text is held until it is known not to."""
    pieces, _ = streamed(tokenizer, [*b"xSTo"], ["STOP"])
    assert pieces == ["x", "", "", "STo", ""]


def test_bytes_that_never_become_characters_are_given_up(tokenizer: Tokenizer) -> None:
    """After enough tokens without a character what is certain is shown, and the rest still joins to the whole."""
    tokens = [0x80] * (MAX_HELD_TOKENS + 5) + [*"🎩".encode()]
    pieces, _ = streamed(tokenizer, tokens, [])
    assert any(pieces[: MAX_HELD_TOKENS + 1])
    assert "".join(pieces) == tokenizer.decode(tokens)
    cut = [0x80] * (MAX_HELD_TOKENS - 2) + [*"🎩".encode()]  # the limit falls into the middle of a character
    assert "".join(streamed(tokenizer, cut, [])[0]).endswith("🎩")


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tokenizer as Llama 2's: a leading space is stripped, and bytes are tokens of their own."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁ab", "▁a"]
    vocab = {piece: number for number, piece in enumerate(pieces)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    fast = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", clean_up_tokenization_spaces=False)  # noqa: S106
    fast.save_pretrained(folder)
    return Tokenizer(folder)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.sampled_from([[256], [257], [258], [259], [260], [*"🎩".encode()]]), max_size=20))
def test_spaces_before_words_stay(sentencepiece: Tokenizer, parts: list[list[int]]) -> None:
    """A tokenizer that strips a leading space strips only the answer's first, and characters come whole."""
    tokens = [token for part in parts for token in part]
    pieces, _ = streamed(sentencepiece, tokens, [])
    assert "".join(pieces) == sentencepiece.decode(tokens)


def test_a_space_after_special_tokens_stays(sentencepiece: Tokenizer) -> None:
    """A word after any number of special tokens keeps the space before it."""
    (end,) = sentencepiece._special
    tokens = [259, *[end] * (2 * MAX_HELD_TOKENS), 260]
    assert "".join(streamed(sentencepiece, tokens, [])[0]) == sentencepiece.decode(tokens) == "ab a"


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    """Special tokens show nothing, also in the middle of a character."""
    adapter = [*"🎩".encode()]
    assert "".join(streamed(tokenizer, [EOS, *adapter[:2], EOS, *adapter[2:], EOS], [])[0]) == "🎩"
    assert tokenizer.is_special(EOS) and not tokenizer.is_special(97)


@settings(max_examples=100, deadline=None)
@given(tokens=TOKENS)
@example(tokens=[0xF0, EOS, 0x80])
def test_special_tokens_that_are_shown(tokenizer: Tokenizer, tokens: list[int]) -> None:
    """A special token that is to be shown has its name at its place, between the texts around it; others have none."""
    stream = TextStream(tokenizer, [], shown={EOS: "<call>"})
    found = "".join([*map(stream.push, tokens), stream.flush()])
    parts = bytes(0 if token == EOS else token for token in tokens if token != PAD).split(b"\0")
    if 0 not in tokens:
        assert found == "<call>".join(tokenizer.decode([*part]) for part in parts)


def test_a_stop_text_in_a_shown_token(tokenizer: Tokenizer) -> None:
    """A stop text may lie across a shown token, and ends the answer before it."""
    stream = TextStream(tokenizer, ["a<c"], shown={EOS: "<call>"})
    assert [stream.push(98), stream.push(97), stream.push(EOS)] == ["b", "", ""] and stream.is_stopped


@pytest.mark.parametrize("token", [EOS, 97, 0x80])
def test_a_long_answer_costs_no_more_a_token(tokenizer: Tokenizer, token: int) -> None:
    """The window that is decoded for each token stays short, for any tokens."""
    stream = TextStream(tokenizer, [])
    for _ in range(500):
        stream.push(token)
        assert len(stream._window) <= 2 * MAX_HELD_TOKENS


def test_threads_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    """Encoding in threads while another decodes gives what it gives alone."""
    texts = [f"text {number} 🎩" * 20 for number in range(64)]
    alone = [tokenizer.encode(text) for text in texts]
    with ThreadPoolExecutor(4) as pool:
        until, rounds = time.monotonic() + 0.3, 0
        while time.monotonic() < until or rounds < 2:
            assert list(pool.map(tokenizer.encode, texts)) == alone
            rounds += 1
