"""AdapterHub's saved bottlenecks against AdapterHub's own answers, and every key of its config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from adapters_store.artifact import read_folder
from adapters_store.methods import compile_patch
from tests.adapters_store.forge import spec_of
from tests.golden.make_adapterhub import ANSWERS, CASES, HERE, base_digest
from tests.kit import reference
from tests.kit.tiny import make_tiny_base

GOLDEN = json.loads(ANSWERS.read_text())
Base = tuple[Any, Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    """The tiny bases that the golden artifacts were made for."""
    made: dict[str, Base] = {}

    def base_of(model_type: str) -> Base:
        if model_type not in made:
            folder = make_tiny_base(tmp_path_factory.mktemp(model_type), model_type)
            made[model_type] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), folder
        return made[model_type]

    return base_of


@pytest.mark.parametrize("model_type", CASES)
def test_the_bases_are_those_of_the_golden_answers(bases: Callable[[str], Base], model_type: str) -> None:
    """Made by either version of transformers, a tiny base has the same weights."""
    assert base_digest(bases(model_type)[0]) == GOLDEN[model_type]["base_sha256"]


@pytest.mark.parametrize(
    ("model_type", "name"), [(kind, name) for kind, cases in CASES.items() for name in ["base", *cases]]
)
def test_an_artifact_answers_as_in_adapterhub(bases: Callable[[str], Base], model_type: str, name: str) -> None:
    """Logits after the prompt are AdapterHub's, and so are all greedy tokens; they are not the base's."""
    model, folder = bases(model_type)
    worn = [] if name == "base" else [(compile_patch(read_folder(HERE / model_type / name), spec_of(folder)), 1.0)]
    answers = GOLDEN[model_type]["answers"]
    for golden, stock in zip(answers[name], answers["base"], strict=True):
        prompt, tokens = golden["prompt"], golden["tokens"]
        logits = reference.logits(model, worn, prompt + tokens)[len(prompt) - 1 : -1]
        assert (logits[0] - torch.tensor(golden["logits"])).abs().max() < 1e-3
        assert logits.argmax(-1).tolist() == tokens
        assert name == "base" or max(abs(a - b) for a, b in zip(golden["logits"], stock["logits"], strict=True)) > 0.1
