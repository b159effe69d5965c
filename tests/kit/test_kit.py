"""The kit keeps what it promises to the other tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.kit.adapters import make_lora, tensors_digest, zip_folder
from tests.kit.server import serve
from tests.kit.services import postgresql
from tests.kit.tiny import EOS, make_tiny_base


def test_bases_and_adapters_depend_on_their_seed_alone(tiny_base: Path, tmp_path: Path) -> None:
    """The same seed makes the same weights and the same upload, byte for byte; another seed makes others."""
    again = make_tiny_base(tmp_path / "again")
    other = make_tiny_base(tmp_path / "other", seed=1)
    assert tensors_digest(again) == tensors_digest(tiny_base) != tensors_digest(other)
    uploads = [zip_folder(make_lora(tmp_path / str(place), tiny_base, seed)) for place, seed in enumerate((1, 1, 2))]
    assert uploads[0] == uploads[1] != uploads[2]


def test_any_text_has_bytes_for_tokens(tiny_base: Path) -> None:
    """A token is a byte: every text comes back from its tokens, and an end token is not text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    text = " Hüte 🎩\n\x00ÿ"
    ids = tokenizer(text).input_ids
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, EOS], skip_special_tokens=True) == text


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # PEFT uses transformers' old name
def test_an_adapter_changes_the_answer_and_keeps_it_sane(tiny_base: Path, tmp_path: Path) -> None:
    """PEFT opens what `make_lora` wrote; the logits move by about their own spread, and stay finite."""
    ids = torch.arange(32)[None]
    base = AutoModelForCausalLM.from_pretrained(tiny_base)
    before = base(ids).logits
    after = PeftModel.from_pretrained(base, make_lora(tmp_path, tiny_base))(ids).logits
    assert 0.2 < ((after - before).std() / before.std()).item() < 2


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    """A server that ends at its start is an error with the end of its log."""
    with pytest.raises(RuntimeError, match=r"no config\.json"), serve(tmp_path, tmp_path / "data"):
        pass


def test_without_postgresql_a_test_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no PostgreSQL a test of it is skipped, and the word says what is missing and how it comes."""
    monkeypatch.setattr("shutil.which", lambda _name: None)
    monkeypatch.setattr(Path, "glob", lambda _folder, _pattern: iter(()))
    with pytest.raises(pytest.skip.Exception, match=r"not installed \(apt-get install postgresql\)"), postgresql():
        pass
