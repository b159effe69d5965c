"""Ends in training: an artifact names its own, and nothing is trained that a server would not stop at or would cut."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters_store.format.folder import read_folder
from server.requests.tokenizer import Tokenizer
from tests.kit.tiny import BOS, EOS, PAD
from tests.training.conftest import flags
from training.base import load_base


def base_ending(folder: Path, base: Path, token: str, **config: Any) -> Path:
    """Write a copy of a base whose tokenizer ends texts with a token, and whose configs have other values."""
    shutil.copytree(base, folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": token}))
    for name in ("config.json", "generation_config.json"):
        (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **config}))
    return folder


def test_an_artifact_names_its_end(tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """The manifest has the token that rows end with, also if no config of the base names it."""
    base = base_ending(tmp_path / "base", tiny_base, "<pad>")
    result = command(*flags(base, data, tmp_path / "out", "--steps", 1, "--layers", "all"))
    assert result.exit_code == 0, result.output
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None and manifest.ends == [PAD]


def test_scores_are_of_answers_that_end_as_served_ones(tiny_base: Path, tmp_path: Path) -> None:
    """The ends of an evaluation are those of the configs and of the tokenizer."""
    base = base_ending(tmp_path / "base", tiny_base, "<pad>", eos_token_id=[5, EOS])
    assert load_base(str(base), "cpu", None, print).ends == {5, EOS, PAD}


def test_a_completion_that_a_server_would_cut_is_refused(
    tiny_base: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """A row whose completion holds an end of the base is named with its line and the token."""
    base = base_ending(tmp_path / "base", tiny_base, "<pad>", eos_token_id=[EOS, ord("~")])
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a", "completion": text}) + "\n" for text in ("b", "c~d")))
    result = command(*flags(base, file, tmp_path / "out", "--steps", 1))
    found = " ".join(result.output.split())
    assert result.exit_code == 1 and "rows.jsonl line 2: the completion holds '~'" in found
    assert not (tmp_path / "out").exists()


def test_an_end_that_the_model_cannot_write_is_refused(
    tiny_base: Path, data: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    """A tokenizer whose end is no token of the model is refused before anything is trained."""
    base = base_ending(tmp_path / "base", tiny_base, "<another>")
    result = command(*flags(base, data, tmp_path / "out", "--steps", 1))
    assert result.exit_code == 1 and "which the model cannot write" in " ".join(result.output.split())


def test_rows_are_text_as_served_turns_are(tiny_base: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """The name of a control token in a row is text, in a template the token; a server encodes turns to the same."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"a<eos>{i}", "completion": f"<bos>{i}"}) + "\n" for i in range(3)))
    common = ["--base", tiny_base, "--data", file, "--eval", file, "--out", tmp_path / "out", "--layers", "all"]
    result = command(*common, "--steps", 1, "--template", "<bos>{prompt}:{completion}")
    assert result.exit_code == 0, result.output
    manifest = read_folder(tmp_path / "out").manifest
    assert manifest is not None and manifest.prompt_format is not None
    prompts = [case.prompt_token_ids for case in manifest.parity]
    assert prompts == [[BOS, *f"a<eos>{i}:".encode()] for i in range(3)]
    encoder = Tokenizer(tiny_base).turns
    assert [
        encoder.encode(encoder.render([("user", f"a<eos>{i}")], manifest.prompt_format)) for i in range(3)
    ] == prompts
