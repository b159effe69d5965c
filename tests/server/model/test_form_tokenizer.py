"""The tokenizer that forms need: made of the base's own, or absent with a word in the log."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.model.form_tokenizer import load_form_tokenizer
from tests.kit.tiny import EOS, VOCAB_SIZE


def test_it_has_the_bases_vocabulary(tiny_base: Path) -> None:
    """It has as many tokens as the logits, and the base's ends."""
    tokenizer = load_form_tokenizer(tiny_base, VOCAB_SIZE, [EOS])
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.eos_tokens) == (VOCAB_SIZE, [EOS])
    assert tokenizer.tokenize_str("ab") == [*b"ab"]


@pytest.mark.parametrize("ends", [[], [EOS]])
def test_a_base_without_one_is_served_without_forms(
    tmp_path: Path, ends: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A base that names no end, or has no tokenizer, is no error: the log says what it cannot do."""
    assert load_form_tokenizer(tmp_path, VOCAB_SIZE, ends) is None
    assert "cannot be held to a form" in caplog.text
