"""MiSS against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import MissConfig as PeftMissConfig

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.miss import IGNORED_KEYS, SERVED_VALUES, MissConfig
from adapters_store.primitives import Delta, LowRank
from tests.adapters_store.methods.method_contract import ConfigCase, LinearContract, TensorsCase, Values, on
from tests.kit.adapters import make_peft
from tests.kit.families.relatives import scaled
from tests.kit.like_peft import assert_answers_as_peft, changed

Q = "base_model.model.model.layers.0.self_attn.q_proj.miss_block"  # of [4, 64]
TARGETS: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "k_proj"]}
BAT, MINI = {"init_weights": "bat"}, {"init_weights": "mini", "mini_r": 8}
CASES: dict[str, Values] = {
    "all linear": {"r": 4, "target_modules": "all-linear"},
    "a rank that does not divide": {"r": 5, "target_modules": "all-linear"},
    "the greatest rank": {"r": 64, "target_modules": "all-linear", "exclude_modules": ["mlp.down_proj"]},
    "mini": {"r": 7, "target_modules": "all-linear", "init_weights": "mini", "mini_r": 16},
    "bat": {"r": 8, "target_modules": "all-linear", "init_weights": "bat"},
    "one layer, another beginning": {**TARGETS, "layers_to_transform": 1, "init_weights": False},
    "an expression and the head": {**TARGETS, "target_modules": r".*(down_proj|lm_head)"},
}
TENSORS: dict[str, TensorsCase] = {
    "another rank": ({"r": 8}, {}, Q, r"shape \[4, 64\].*need \[8, 64\]"),
    "not bat's": (BAT, {}, Q, r"need \[16, 4, 4\]"),
    "not mini's": (MINI, {}, Q, r"need \[4, 8\]"),
}
CONFIGS: dict[str, ConfigCase] = {
    "r is 0": ({"r": 0}, "r has the rank 0"),
    "r is beyond the inputs": ({"r": 65}, "r has the rank 65, but model.layers.0.self_attn.q_proj has 64 inputs"),
    "r does not divide": ({"r": 5, "init_weights": "bat"}, "r is 5, which does not divide .*q_proj into blocks"),
    "mini_r is 0": ({"mini_r": 0}, "mini_r has the rank 0"),
    "mini_r does not divide": ({"init_weights": "mini", "mini_r": 7}, "mini_r is 7, which does not divide"),
    "an unknown variant": ({"init_weights": "bat2"}, r"\$\.init_weights"),
}


class TestMiss(LinearContract):
    """Each of its variants, with ranks that divide the inputs and that do not."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "MISS", "MiSS", PeftMissConfig, MissConfig
    IGNORED_KEYS, SERVED_VALUES, FILL = IGNORED_KEYS, SERVED_VALUES, staticmethod(scaled(0.05))
    FAMILIES, FAMILY_ON = ["miss"], [("phi3", 0), ("opt", 1), ("gemma2", 2)]
    SOUND = TARGETS
    CASES, TENSORS, CONFIGS = on("llama", CASES), TENSORS, CONFIGS

    def test_whatever_holds_fewer_numbers_is_kept(self, tmp_path: Path, tiny_base: Path) -> None:
        """Two factors are kept if they have fewer numbers, else the full update."""
        for rank, kind in ((31, LowRank), (32, Delta)):  # 64 x 64: equal at 32
            config = PeftMissConfig(task_type="CAUSAL_LM", r=rank, target_modules=["q_proj"])
            folder = make_peft(tmp_path / str(rank), tiny_base, config, fill=scaled(0.05))
            assert {type(primitive) for primitive in assert_answers_as_peft(tiny_base, folder).primitives} == {kind}

    def test_an_update_that_overflows_is_refused(self, sound: Artifact, spec: BaseSpec) -> None:
        """Finite tensors whose product with the base's weight is not are refused by name."""
        alone = {**dict.fromkeys(sound.tensors), Q: torch.full((16, 4, 4), 3e38)}
        config = {"target_modules": ["layers.0.self_attn.q_proj"], "init_weights": "bat"}
        with pytest.raises(ArtifactError, match=r"q_proj\.miss_block overflows where it is compiled"):
            compile_patch(changed(sound, config, alone), spec)
