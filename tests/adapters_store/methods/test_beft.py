"""BEFT against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import BeftConfig as PeftBeftConfig

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.beft import IGNORED_KEYS, SERVED_VALUES, BeftConfig
from adapters_store.methods.compile import compile_patch
from tests.kit.adapters import make_peft
from tests.kit.families.relatives import make_beft, noise
from tests.kit.forge import spec_of
from tests.kit.like_peft import assert_answers_as_peft, assert_every_key_is_judged, changed

Q = "base_model.model.model.layers.0.self_attn.q_proj.beft_bias"  # of [1, 64]
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "k_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "all linear": {"target_modules": "all-linear"},
    "two a layer": TARGETS,
    "an expression and the head": {"target_modules": r".*(down_proj|lm_head)", "init_weights": False},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Artifact:
    """A sound artifact of queries and keys."""
    config = PeftBeftConfig(task_type="CAUSAL_LM", **TARGETS)
    return read_folder(make_peft(tmp_path_factory.mktemp("beft") / "hat", tiny_base, config, fill=noise))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_beft_answers_as_in_peft(tmp_path: Path, tiny_base: Path, case: dict[str, Any]) -> None:
    """Biases, also where the base has none, give PEFT's logits."""
    config = PeftBeftConfig(task_type="CAUSAL_LM", **case)
    assert_answers_as_peft(tiny_base, make_peft(tmp_path / "hat", tiny_base, config, fill=noise))


@pytest.mark.parametrize(("model_type", "seed"), [("phi3", 0), ("opt", 1), ("gemma2", 2)])
def test_beft_answers_as_in_peft_on_other_bases(
    tmp_path: Path, tiny_of: Callable[[str], Path], model_type: str, seed: int
) -> None:
    """Fused projections and biases make no difference."""
    base = tiny_of(model_type)
    assert_answers_as_peft(base, make_beft(tmp_path / "hat", base, seed))


def test_a_conv1d_has_no_beft(sound: Artifact, tiny_of: Callable[[str], Path]) -> None:
    """PEFT does not have it there; what its tensors would mean is not guessed."""
    name = "base_model.model.transformer.h.0.attn.c_attn.beft_bias"
    foreign = changed(sound, {}, {**dict.fromkeys(sound.tensors), name: torch.ones(2, 2)})
    with pytest.raises(ArtifactError, match=r"c_attn.* acts on a Conv1D") as caught:
        compile_patch(foreign, spec_of(tiny_of("gpt2")))
    assert (caught.value.code, caught.value.param) == ("method_unsupported", name)


TENSORS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "missing": ({}, {Q: None}, Q, "is missing: target_modules names its site"),
    "transposed": ({}, {Q: torch.ones(64, 1)}, Q, r"shape \[64, 1\].*need \[1, 64\]"),
    "one dimension": ({}, {Q: torch.ones(64)}, Q, r"need \[1, 64\]"),
    "another base's width": ({}, {Q: torch.ones(1, 65)}, Q, r"need \[1, 64\]"),
    "no such layer": ({}, {Q.replace(".0.", ".7."): torch.ones(1, 64)}, Q.replace(".0.", ".7."), "no site in"),
    "another method's": ({}, {Q.replace("beft_", ""): torch.ones(64)}, Q.replace("beft_", ""), "no site in"),
    "a site of no target": ({"target_modules": ["k_proj"]}, {}, Q, "is extra"),
}


@pytest.mark.parametrize(("config", "tensors", "name", "reason"), TENSORS.values(), ids=TENSORS)
def test_config_tensors_and_base_must_agree(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], tensors: dict[str, Any], name: str, reason: str
) -> None:
    """A tensor without its site, a site without its tensor, a wrong shape or rank: refused by the tensor's name."""
    with pytest.raises(ArtifactError, match=reason) as caught:
        compile_patch(changed(sound, config, tensors), spec)
    assert (caught.value.param, name in str(caught.value)) == (name, True)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "BEFT with modules_to_save=.* is not served"),
    "an unknown key": ({"bias": "none"}, "a key that is not known: bias"),
    "targets are a number": ({"target_modules": 3}, r"\$\.target_modules"),
}


@pytest.mark.parametrize(("config", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_served_is_refused_by_name(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], reason: str
) -> None:
    """A key or a value that may change the answer is never ignored; numbers are bounded."""
    with pytest.raises(ArtifactError, match=reason):
        compile_patch(changed(sound, config, {}), spec)


def test_every_key_that_peft_writes_is_judged() -> None:
    """No key of the installed PEFT's BeftConfig is unknown here."""
    assert_every_key_is_judged(PeftBeftConfig, BeftConfig, IGNORED_KEYS, SERVED_VALUES)
