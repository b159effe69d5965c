"""(IA)3 against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import IA3Config as PeftIA3Config
from peft.tuners.ia3 import IA3Model

from adapters_store.base.spec import BaseSpec
from adapters_store.format.folder import Artifact
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.ia3 import IGNORED_KEYS, SERVED_VALUES, IA3Config
from adapters_store.methods.shared.targets import ends_with_any
from adapters_store.primitives import Scale
from tests.adapters_store.methods.method_contract import ConfigCase, LinearContract, TensorsCase, Values, on
from tests.kit.families.relatives import around_one

K = "base_model.model.model.layers.0.self_attn.k_proj.ia3_l"  # of [32, 1]
DOWN = "base_model.model.model.layers.1.mlp.down_proj.ia3_l"  # of [1, 96]
NORM = "base_model.model.model.norm.ia3_l"
LISTS: dict[str, Any] = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CASES: dict[str, Values] = {
    "PEFT's own choice": {},
    "no feed-forward": {"target_modules": ["q_proj", "o_proj"], "feedforward_modules": []},
    "feed-forward alone": {"target_modules": ["gate_proj", "v_proj"], "feedforward_modules": ["gate_proj", "v_proj"]},
    "feed-forward by an expression": {"target_modules": "all-linear", "feedforward_modules": r".*\.(q|down)_proj"},
    "feed-forward by a text": {"target_modules": ["down_proj"], "feedforward_modules": "model.layers...mlp.down_proj"},
    "excluded": {**LISTS, "exclude_modules": ["layers.0.mlp.down_proj", "1.self_attn.k_proj"]},
    "the head too": {"target_modules": ["lm_head", "up_proj"], "feedforward_modules": ["lm_head"]},
}
TENSORS: dict[str, TensorsCase] = {
    "feed-forward's output": ({}, {DOWN: torch.ones(64, 1)}, DOWN, r"need \[1, 96\]"),
    "no linear": ({}, {NORM: torch.ones(64, 1)}, NORM, "no site in"),
    "all outputs": ({"feedforward_modules": []}, {}, DOWN.replace(".1.", ".0."), r"need \[64, 1\]"),
    "all inputs": ({"feedforward_modules": ["proj"]}, {}, K, r"need \[1, 64\]"),
    "a text": ({"feedforward_modules": "down_proj"}, {}, DOWN.replace(".1.", ".0."), r"need \[64, 1\]"),
    "neither": ({"feedforward_modules": None}, {K: torch.ones(33, 1)}, K, r"need \[32, 1\]"),
    "other targets": ({"target_modules": ["k_proj", "v_proj"]}, {}, DOWN.replace(".1.", ".0."), "is extra"),
}  # fmt: skip
CONFIGS: dict[str, ConfigCase] = {
    "feed-forward holds a number": ({"feedforward_modules": [3]}, r"\$\.feedforward_modules"),
}


class TestIA3(LinearContract):
    """Scales of outputs and of inputs, at exactly PEFT's sites; an output's scale is on its bias too."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "IA3", "(IA)3", PeftIA3Config, IA3Config
    IGNORED_KEYS, SERVED_VALUES, FILL, SOUND = IGNORED_KEYS, SERVED_VALUES, staticmethod(around_one), LISTS
    FAMILIES, FAMILY_ON = ["ia3"], [(kind, 3) for kind in ("gpt2", "phi3", "opt", "gemma2", "starcoder2")]
    CASES, TENSORS, CONFIGS = on("llama", CASES), TENSORS, CONFIGS

    def test_a_site_is_scaled_where_the_config_says(self, sound: Artifact, spec: BaseSpec) -> None:
        """Feed-forward modules scale their input, all others their output, with the vector as it is."""
        scales = {scale.site: scale for scale in compile_patch(sound, spec).primitives if isinstance(scale, Scale)}
        assert {site for site, scale in scales.items() if scale.on == "input"} == {
            site for site in scales if "down_proj" in site
        }
        assert all(
            torch.equal(scale.v, sound.tensors[f"base_model.model.{site}.ia3_l"].flatten())
            for site, scale in scales.items()
        )


@given(st.lists(st.text("ab.", max_size=4), max_size=4), st.text("ab.", min_size=1, max_size=8))
def test_feedforward_modules_are_found_as_in_peft(names: list[str], site: str) -> None:
    """A site is one if it ends with a name, at a dot or not."""
    expected = IA3Model._check_target_module_feedforward(SimpleNamespace(feedforward_modules=set(names)), site)
    assert ends_with_any(site, frozenset(names)) == expected
