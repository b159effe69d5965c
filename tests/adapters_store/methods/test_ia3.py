"""(IA)3 against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config as PeftIA3Config
from peft.tuners.ia3 import IA3Model

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.ia3 import IGNORED_KEYS, SERVED_VALUES, IA3Config, is_feedforward
from adapters_store.primitives import Scale
from tests.kit.adapters import make_peft
from tests.kit.families.relatives import around_one, make_ia3
from tests.kit.like_peft import assert_answers_as_peft, assert_every_key_is_judged, changed

K = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"  # of [32, 1]
DOWN = "base_model.model.model.layers.1.mlp.down_proj.ia3_l"  # of [1, 96]
NORM = "base_model.model.model.norm.ia3_l"
LISTS: dict[str, Any] = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CASES: dict[str, dict[str, Any]] = {
    "PEFT's own choice": {},
    "no feed-forward": {"target_modules": ["q_proj", "o_proj"], "feedforward_modules": []},
    "feed-forward alone": {"target_modules": ["gate_proj", "v_proj"], "feedforward_modules": ["gate_proj", "v_proj"]},
    "feed-forward by an expression": {"target_modules": "all-linear", "feedforward_modules": r".*\.(q|down)_proj"},
    "feed-forward by a text": {"target_modules": ["down_proj"], "feedforward_modules": "model.layers...mlp.down_proj"},
    "excluded": {**LISTS, "exclude_modules": ["layers.0.mlp.down_proj", "1.self_attn.k_proj"]},
    "the head too": {"target_modules": ["lm_head", "up_proj"], "feedforward_modules": ["lm_head"]},
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Artifact:
    """A sound artifact of keys, values and down projections."""
    config = PeftIA3Config(task_type="CAUSAL_LM", **LISTS)
    return read_folder(make_peft(tmp_path_factory.mktemp("ia3") / "hat", tiny_base, config, fill=around_one))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ia3_answers_as_in_peft(tmp_path: Path, tiny_base: Path, case: dict[str, Any]) -> None:
    """Scales of outputs and of inputs, at exactly PEFT's sites, give PEFT's logits."""
    config = PeftIA3Config(task_type="CAUSAL_LM", **case)
    assert_answers_as_peft(tiny_base, make_peft(tmp_path / "hat", tiny_base, config, fill=around_one))


@pytest.mark.parametrize("model_type", ["gpt2", "phi3", "opt", "gemma2", "starcoder2"])
def test_ia3_answers_as_in_peft_on_other_bases(tmp_path: Path, tiny_of: Callable[[str], Path], model_type: str) -> None:
    """Transposed weights, fused projections and biases: an output's scale is on its bias too."""
    base = tiny_of(model_type)
    assert_answers_as_peft(base, make_ia3(tmp_path / "hat", base, seed=3))


def test_a_site_is_scaled_where_the_config_says(sound: Artifact, spec: BaseSpec) -> None:
    """Feed-forward modules scale their input, all others their output, with the vector as it is."""
    scales = {scale.site: scale for scale in compile_patch(sound, spec).primitives if isinstance(scale, Scale)}
    assert {site for site, scale in scales.items() if scale.on == "input"} == {
        site for site in scales if "down_proj" in site
    }
    assert all(
        torch.equal(scale.v, sound.tensors[f"base_model.model.{site}.ia3_l"].flatten())
        for site, scale in scales.items()
    )


TENSORS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {
    "missing": ({}, {K: None}, K, "is missing: target_modules names its site"),
    "extra": ({}, {K.replace("k_proj", "q_proj"): torch.ones(64, 1)}, K.replace("k_proj", "q_proj"), "is extra"),
    "transposed": ({}, {K: torch.ones(1, 32)}, K, r"shape \[1, 32\].*need \[32, 1\]"),
    "feed-forward transposed": ({}, {DOWN: torch.ones(96, 1)}, DOWN, r"shape \[96, 1\].*need \[1, 96\]"),
    "feed-forward's output": ({}, {DOWN: torch.ones(64, 1)}, DOWN, r"need \[1, 96\]"),
    "one dimension": ({}, {K: torch.ones(32)}, K, r"shape \[32\].*need \[32, 1\]"),
    "three dimensions": ({}, {K: torch.ones(32, 1, 1)}, K, r"need \[32, 1\]"),
    "another base's width": ({}, {K: torch.ones(40, 1)}, K, r"need \[32, 1\]"),
    "another base's layer": ({}, {K.replace(".0.", ".7."): torch.ones(32, 1)}, K.replace(".0.", ".7."), "no site in"),
    "no linear": ({}, {NORM: torch.ones(64, 1)}, NORM, "no site in"),
    "another method's": ({}, {K.replace("ia3_l", "lora_A.weight"): torch.ones(2, 64)}, "lora_A", "no site in"),
    "all outputs": ({"feedforward_modules": []}, {}, DOWN.replace(".1.", ".0."), r"need \[64, 1\]"),
    "all inputs": ({"feedforward_modules": ["proj"]}, {}, K, r"need \[1, 64\]"),
    "a text": ({"feedforward_modules": "down_proj"}, {}, DOWN.replace(".1.", ".0."), r"need \[64, 1\]"),
    "neither": ({"feedforward_modules": None}, {K: torch.ones(33, 1)}, K, r"need \[32, 1\]"),
    "other targets": ({"target_modules": ["k_proj", "v_proj"]}, {}, DOWN.replace(".1.", ".0."), "is extra"),
    "none": ({}, dict.fromkeys([K, DOWN]), K, "is missing"),
}  # fmt: skip


@pytest.mark.parametrize(("config", "tensors", "name", "reason"), TENSORS.values(), ids=TENSORS)
def test_config_tensors_and_base_must_agree(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], tensors: dict[str, Any], name: str, reason: str
) -> None:
    """A tensor without its site, a site without its tensor, a wrong shape: refused by the tensor's name."""
    with pytest.raises(ArtifactError, match=reason) as caught:
        compile_patch(changed(sound, config, tensors), spec)
    assert name in (caught.value.param or "")
    assert (caught.value.param or "?") in str(caught.value)


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"\(IA\)3 with modules_to_save=.* is not served"),
    "task_type": ({"task_type": "SEQ_CLS"}, "task_type=SEQ_CLS is not served"),
    "an unknown key": ({"magic": 1}, "a key that is not known: magic"),
    "feed-forward is a number": ({"feedforward_modules": 3}, r"\$\.feedforward_modules"),
    "feed-forward holds a number": ({"feedforward_modules": [3]}, r"\$\.feedforward_modules"),
    "targets hold a number": ({"target_modules": [3]}, r"\$\.target_modules"),
}


@pytest.mark.parametrize(("config", "reason"), CONFIGS.values(), ids=CONFIGS)
def test_what_is_not_served_is_refused_by_name(
    sound: Artifact, spec: BaseSpec, config: dict[str, Any], reason: str
) -> None:
    """A key or a value that may change the answer is never ignored."""
    with pytest.raises(ArtifactError, match=reason):
        compile_patch(changed(sound, config, {}), spec)


def test_every_key_that_peft_writes_is_judged() -> None:
    """No key of the installed PEFT's IA3Config is unknown here."""
    assert_every_key_is_judged(PeftIA3Config, IA3Config, IGNORED_KEYS, SERVED_VALUES)


@given(st.lists(st.text("ab.", max_size=4), max_size=4), st.text("ab.", min_size=1, max_size=8))
def test_feedforward_modules_are_found_as_in_peft(names: list[str], site: str) -> None:
    """A site is one if it ends with a name, at a dot or not."""
    expected = IA3Model._check_target_module_feedforward(SimpleNamespace(feedforward_modules=set(names)), site)
    assert is_feedforward(site, frozenset(names)) == expected


def test_a_hundred_thousand_names_are_quick() -> None:
    """The largest list that a config can hold is judged for the most sites that tensors can name in under a second."""
    names = frozenset(f"{i}" for i in range(100_000))
    began = time.thread_time()
    assert not any(is_feedforward(f"model.layers.{layer}.self_attn.k_proj", names) for layer in range(4096))
    assert time.thread_time() - began < 1
