"""The tokenizer that forms need: made of the base's own, or absent with a word in the log."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from adapters_store.form import compile_grammar
from server.engine.forms import FormMatcher
from server.engine.nursery import Nursery
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


def test_it_survives_a_fork(tiny_base: Path) -> None:
    """It is built once, in the process that forks engines: no thread is left there, and a fork's masks are the same."""
    before = {path.name for path in Path("/proc/self/task").iterdir()}
    tokenizer = load_form_tokenizer(tiny_base, VOCAB_SIZE, [EOS])
    assert tokenizer is not None
    masks = [FormMatcher(compile_grammar(tokenizer, "start: /[a-c]+/"), [EOS]).mask()]
    assert {path.name for path in Path("/proc/self/task").iterdir()} <= before

    def run(connection: socket.socket) -> None:
        form = FormMatcher(compile_grammar(tokenizer, "start: /[a-c]+/"), [EOS])
        masks.append(form.mask())
        connection.sendall(b"1" if masks[0] == masks[1] else b"0")

    nursery = Nursery.fork(run)
    assert nursery is not None
    child = nursery.spawn()
    with child.socket:
        assert child.socket.recv(1) == b"1"
    child.kill()
    nursery.close()
