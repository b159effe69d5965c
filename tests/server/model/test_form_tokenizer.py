"""The tokenizer that forms need: made of the base's own, or absent with a word in the log."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from unittest.mock import patch

import llguidance.hf
import pytest
from transformers import AutoTokenizer

from adapters_store.form import compile_grammar
from server.engine.forms import FormMatcher
from server.engine.nursery import Nursery
from server.model.form_tokenizer import load_form_tokenizer
from tests.kit.tiny import EOS, VOCAB_SIZE
from tests.kit.tokenizers import save_tokenizer


def test_it_has_the_bases_vocabulary(tiny_base: Path) -> None:
    """It has as many tokens as the logits, and the base's ends."""
    tokenizer = load_form_tokenizer(tiny_base, VOCAB_SIZE, [EOS])
    assert tokenizer is not None
    assert (tokenizer.vocab_size, tokenizer.eos_tokens) == (VOCAB_SIZE, [EOS])
    assert tokenizer.tokenize_str("ab") == [*b"ab"]


@pytest.mark.parametrize("kind", ["bytes", "byte_level", "sentencepiece"])
def test_it_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    """Read from the file alone, each token has the bytes and the part in forms that it has by way of transformers."""
    folder = save_tokenizer(kind, tmp_path / kind)
    slow = AutoTokenizer.from_pretrained(folder)
    wanted = llguidance.hf.from_tokenizer(slow, eos_token=[2])
    with patch.object(AutoTokenizer, "from_pretrained", side_effect=AssertionError):
        tokenizer = load_form_tokenizer(folder, 1, [2])
    assert tokenizer is not None and tokenizer.vocab_size == len(slow) == wanted.vocab_size
    for token in range(len(slow)):
        assert tokenizer.decode_bytes([token]) == wanted.decode_bytes([token]), token
        assert tokenizer.is_special_token(token) == wanted.is_special_token(token), token
    masks = [FormMatcher(compile_grammar(one, "start: /[a-z <>_]+/"), [2]).mask() for one in (tokenizer, wanted)]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_a_kind_that_serves_no_forms(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tokenizer whose tokens have no bytes of their own for llguidance is no error either."""
    assert load_form_tokenizer(save_tokenizer(kind, tmp_path / kind), 1, [2]) is None
    assert "can't determine decoder type" in caplog.text


def test_tokens_that_another_file_adds(tmp_path: Path) -> None:
    """What `tokenizer_config.json` adds is a token of forms, too."""
    folder = save_tokenizer("byte_level", tmp_path / "base")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    number = len(AutoTokenizer.from_pretrained(folder))
    added = {"content": "zzyzx", "special": False, "lstrip": False, "rstrip": False, "normalized": False}
    config["added_tokens_decoder"] = {**config.get("added_tokens_decoder", {}), str(number): added}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_form_tokenizer(folder, 1, [2])
    assert tokenizer is not None and tokenizer.decode_str([number]) == "zzyzx"


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
