"""The engine, in one mixed batch, against AdapterHub alone (`make_adapterhub.py`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.golden import drive
from tests.golden.make_adapterhub import ANSWERS, CASES, HERE
from tests.kit.tiny import make_tiny_base

GOLDEN = json.loads(ANSWERS.read_text())


@pytest.mark.parametrize("model_type", CASES)
def test_adapterhub(model_type: str, tmp_path: Path) -> None:
    """Every folder that AdapterHub saved and the base, in one batch, answer token by token as AdapterHub does."""
    answers = GOLDEN[model_type]["answers"]
    asked = [(name, told) for name in answers for told in answers[name]]
    requests = [drive.Request(name, told["prompt"], len(told["tokens"])) for name, told in asked]
    folders = {name: HERE / model_type / name for name in CASES[model_type]}
    base = make_tiny_base(tmp_path / "base", model_type)
    for (name, told), got in zip(asked, drive.run(drive.load_runner(base), folders, requests), strict=True):
        assert (got.failure, got.tokens) == (None, told["tokens"]), name
        assert got.first_logits is not None
        assert (got.first_logits - torch.tensor(told["logits"])).abs().max() < 1e-3, name
