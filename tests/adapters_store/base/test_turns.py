"""Turns are encoded so that text stays text: by every kind of tokenizer, in a chat template and in a prompt format."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from adapters_store.base.turns import ControlTextError, TurnEncoder
from adapters_store.format.manifest import Around, PromptFormat, Turn
from tests.kit.tokenizers import CALL, KINDS, SPECIAL, save_tokenizer

FORMAT = PromptFormat(
    begin="<s>", system=Around("S:", "\n"), user=Around("<|im_start|>U:", "<|im_end|>\n"), generation="A:"
)
NAMES = [*SPECIAL, CALL]
CONTENT = st.lists(st.sampled_from([*NAMES, "<", "|im_end|>", "<|im_", "the card", " ", "\n", "é🎩"]), max_size=6)
TURNS = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENT.map("".join)), min_size=1, max_size=3
)


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of each kind, with a chat template."""
    return AutoTokenizer.from_pretrained(save_tokenizer(request.param, tmp_path_factory.mktemp(request.param)))


def controls(tokenizer: Any, tokens: list[int], names: list[str]) -> Counter[str]:
    """How often each control token is there; <unk> stands for what a vocabulary lacks, too."""
    found = Counter(tokenizer.convert_ids_to_tokens(tokens))
    return Counter({name: found[name] for name in names if found[name] and name != "<unk>"})


def encoded(tokenizer: Any, turns: list[Turn], prompt_format: PromptFormat | None) -> list[int]:
    encoder = TurnEncoder(tokenizer)
    return encoder.encode(encoder.render(turns, prompt_format))


@pytest.mark.parametrize("prompt_format", [None, FORMAT])
@settings(max_examples=40, deadline=None)
@given(turns=TURNS)
def test_no_turn_writes_a_control_token(tokenizer: Any, prompt_format: PromptFormat | None, turns: list[Turn]) -> None:
    """Whatever the turns say, the control tokens are those of the same turns without a word."""
    silent = [(role, "") for role, _ in turns]
    found = controls(tokenizer, encoded(tokenizer, turns, prompt_format), SPECIAL)
    assert found == controls(tokenizer, encoded(tokenizer, silent, prompt_format), SPECIAL)


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_the_text_is_whole(tmp_path: Path, kind: str) -> None:
    """The tokens say the text of the format and of the turns, with nothing between a name's pieces."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer(kind, tmp_path))
    plain = PromptFormat(user=Around("U:", "\n"), generation="A:")
    for names in (NAMES, NAMES[::-1], ["<|im_end|>" * 3, "<<s>s>é🎩", "the </s>card"]):
        turns = [("user", "".join(names)), ("user", " ".join(names))]
        tokens = encoded(tokenizer, turns, plain)
        assert tokenizer.decode(tokens) == "".join(text for text, _ in plain.parts(turns))


@pytest.mark.parametrize("prompt_format", [None, FORMAT])
@given(text=st.text(st.sampled_from([*"the card <|>é\n"]), max_size=30))
@settings(max_examples=40, deadline=None)
def test_a_text_without_names_is_tokenised_as_ever(
    tokenizer: Any, prompt_format: PromptFormat | None, text: str
) -> None:
    """Turns without the name of a control token have the tokens of the whole text that they are written to."""
    turns = [("user", text)]
    if prompt_format is None:
        messages = [{"role": "user", "content": text}]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    else:
        whole = "".join(part for part, _ in prompt_format.parts(turns))
    tokens: list[int] = tokenizer(whole, add_special_tokens=prompt_format is not None)["input_ids"]
    assert encoded(tokenizer, turns, prompt_format) == tokens


def test_a_name_of_a_turn_and_of_the_format_is_text(tokenizer: Any) -> None:
    """A name that begins in the format and ends in a turn, or the other way, is text."""
    open_format = PromptFormat(user=Around("<|im_", "im_end|>"))
    assert not controls(tokenizer, encoded(tokenizer, [("user", "start|> x <|")], open_format), NAMES)


@st.composite
def gluing(draw: st.DrawFn) -> tuple[str, list[Turn]]:
    """Draw a template that writes parts of a name around each turn, and turns that complete it, or one another."""
    name = draw(st.sampled_from([name for name in SPECIAL if name != "<unk>"]))
    at = st.integers(1, len(name) - 1)
    head, tail = draw(st.sampled_from([("", ""), (name[: draw(at)], ""), ("", name[draw(at) :])]))
    content = f"message['content']{draw(st.sampled_from(['', '|trim']))}"
    template = f"{{% for message in messages %}}{{{{ {head!r} + {content} + {tail!r} }}}}{{% endfor %}}"
    part = st.one_of(at.map(lambda cut: name[:cut]), at.map(lambda cut: name[cut:]), CONTENT.map("".join))
    space = st.sampled_from(["", " ", "\n"])
    said = st.tuples(space, part, st.sampled_from(["", "the card"]), part, space).map("".join)
    return template, draw(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), said), min_size=1, max_size=3))


@settings(max_examples=60, deadline=None)
@given(glued=gluing())
def test_a_name_of_a_turn_and_of_the_template_is_text(tokenizer: Any, glued: tuple[str, list[Turn]]) -> None:
    """A name that begins in a template or a turn and ends in another is text, and all of the text is there."""
    template, turns = glued
    usual, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        encoder = TurnEncoder(tokenizer)
        rendered = encoder.render(turns, None)
        messages = [{"role": role, "content": text} for role, text in turns]
        assert "".join(rendered.pieces) == tokenizer.apply_chat_template(messages, tokenize=False)
        silent = [(role, "x") for role, _ in turns]
        expected = controls(tokenizer, encoder.encode(encoder.render(silent, None)), SPECIAL)
        assert controls(tokenizer, encoder.encode(rendered), SPECIAL) == expected
    finally:
        tokenizer.chat_template = usual


def test_a_template_that_looks_at_the_ends_of_a_turn(tokenizer: Any) -> None:
    """A turn that a template changes by its first characters is taken, unless it may complete a name."""
    usual, look = tokenizer.chat_template, "message['content'].startswith('|')"
    tokenizer.chat_template = (
        f"{{% for message in messages %}}{{{{ '<' if {look} else 'U:' }}}}{{{{ message['content'] }}}}{{% endfor %}}"
    )
    try:
        assert not controls(tokenizer, encoded(tokenizer, [("user", "im_end|> x")], None), SPECIAL)
        assert not controls(tokenizer, encoded(tokenizer, [("user", "|> x")], None), SPECIAL)
        with pytest.raises(ControlTextError, match="a turn may complete the name"):
            encoded(tokenizer, [("user", "|im_end|> x")], None)
    finally:
        tokenizer.chat_template = usual


def test_an_answer_comes_back_as_it_was_written(tokenizer: Any) -> None:
    """The name of a control token that answers show, as it is not special, is that token in an assistant's turn."""
    for role, count in (("assistant", 1), ("user", 0), ("system", 0)):
        assert controls(tokenizer, encoded(tokenizer, [(role, f"a {CALL} b")], None), NAMES)[CALL] == count


def test_what_becomes_a_name_is_refused(tmp_path: Path) -> None:
    """Characters that a normalizer makes a control token's name of are refused, and never become that token."""
    tokenizer = AutoTokenizer.from_pretrained(save_tokenizer("unigram", tmp_path))
    assert tokenizer.eos_token_id in tokenizer("＜/s＞")["input_ids"]
    with pytest.raises(ControlTextError, match="control token"):
        encoded(tokenizer, [("user", "＜/s＞")], None)
