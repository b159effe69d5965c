"""OFT against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import OFTConfig as PeftOFTConfig
from peft.tuners.oft.layer import OFTLayer

from adapters_store.base.spec import BaseSpec
from adapters_store.format.folder import Artifact
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.oft import IGNORED_KEYS, MAX_TERMS, SERVED_VALUES, OftConfig, nearest_divisor
from tests.adapters_store.methods.method_contract import ConfigCase, LinearContract, TensorsCase, Values, on
from tests.kit.families.relatives import scaled
from tests.kit.like_peft import changed

Q = "base_model.model.model.layers.0.self_attn.q_proj.oft_R.weight"  # of [8, 28]
TARGETS: dict[str, Any] = {"oft_block_size": 8, "target_modules": ["q_proj", "k_proj"]}
ALL: dict[str, Any] = {**TARGETS, "target_modules": "all-linear"}
BOTH = "of r and oft_block_size exactly one must be above 0"
CASES: dict[str, Values] = {
    "all linear": {"target_modules": "all-linear"},
    "a number of blocks": {**ALL, "r": 4, "oft_block_size": 0},
    "a number of blocks that does not divide": {**ALL, "r": 5, "oft_block_size": 0},
    "a size that does not divide": {**ALL, "oft_block_size": 7},
    "one block": {**TARGETS, "oft_block_size": 100},
    "blocks all alike": {**ALL, "block_share": True},
    "exact": {**ALL, "use_cayley_neumann": False},
    **{f"{terms} terms": {**ALL, "num_cayley_neumann_terms": terms} for terms in (2, 3, 4, 6)},
    "one layer, another beginning": {**TARGETS, "layers_to_transform": [1], "init_weights": False, "eps": 1.0},
    "an expression and the head": {**TARGETS, "target_modules": r".*(down_proj|lm_head)", "module_dropout": 0.2},
}
TENSORS: dict[str, TensorsCase] = {
    "another size": ({"oft_block_size": 16}, {}, Q, r"need \[4, 120\]"),
    "shared": ({"block_share": True}, {}, Q, r"need \[1, 28\]"),
    "overflow": ({}, {Q: torch.full((8, 28), 1e20)}, Q, "overflows where it is"),
}
CONFIGS: dict[str, ConfigCase] = {
    "an old config": ({"oft_block_size": None}, "missing required field `oft_block_size`"),
    "both": ({"r": 4}, BOTH),
    "neither": ({"oft_block_size": 0}, BOTH),
    "r is negative": ({"r": -4, "oft_block_size": 0}, BOTH),
    "the size is negative": ({"oft_block_size": -8, "r": 4}, BOTH),
    "no terms": ({"num_cayley_neumann_terms": 0}, "num_cayley_neumann_terms is not between 1 and 100"),
    "too many terms": ({"num_cayley_neumann_terms": MAX_TERMS + 1}, "num_cayley_neumann_terms is not between"),
    "no version": ({"peft_version": None}, "of a PEFT before 0.18 is another rotation"),
    "an old version": ({"peft_version": "0.17.2"}, "of a PEFT before 0.18 is another rotation"),
    "a text as a version": ({"peft_version": "new"}, "of a PEFT before 0.18 is another rotation"),
    "a list as a version": ({"peft_version": [0, 21]}, "of a PEFT before 0.18 is another rotation"),
}


class TestOft(LinearContract):
    """Rotations by the series or exact, in blocks of any size, of their own or all alike."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "OFT", "OFT", PeftOFTConfig, OftConfig
    IGNORED_KEYS, JUDGED, SERVED_VALUES = IGNORED_KEYS, ["peft_version"], SERVED_VALUES
    FAMILIES, FAMILY_ON = ["oft"], [("phi3", 3), ("opt", 2), ("gemma2", 1)]
    FILL, SOUND, SEED = staticmethod(scaled(0.06)), TARGETS, 0  # other turns' logits are 14, their rounding over 1e-4
    CASES, TENSORS, CONFIGS = on("llama", CASES), TENSORS, CONFIGS

    @pytest.mark.parametrize("version", ["0.18.0", "0.21.2", "0.19.0.dev0@ab12", "1.0"])
    def test_later_versions_of_peft_turn_alike(self, sound: Artifact, spec: BaseSpec, version: str) -> None:
        """The series is what it is since 0.18; the exact rotation always was."""
        compile_patch(changed(sound, {"peft_version": version}, {}), spec)
        compile_patch(changed(sound, {"peft_version": "0.16.0", "use_cayley_neumann": False}, {}), spec)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 300), st.integers(1, 400))
def test_sizes_are_adjusted_as_in_peft(number: int, wanted: int) -> None:
    """A size that does not divide the inputs becomes PEFT's."""
    is_fit = number % wanted == 0 and wanted <= number
    expected = wanted if is_fit else OFTLayer.adjust_oft_parameters(None, number, wanted)
    assert nearest_divisor(number, wanted) == expected
