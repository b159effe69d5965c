"""LoKr against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoKrConfig as PeftLoKrConfig
from peft.tuners.lokr.layer import factorization as peft_factorization

from adapters_store.methods.lokr import LokrConfig, factorization
from adapters_store.methods.shared.lycoris import IGNORED_KEYS, SERVED_VALUES
from adapters_store.primitives import Delta, LowRank
from tests.adapters_store.methods.method_contract import ConfigCase, LinearContract, TensorsCase, Values, on
from tests.kit.adapters import shake

SITE = "base_model.model.model.layers.{}.self_attn.{}.lokr_{}"
W1, A2, B2 = (SITE.format(0, "k_proj", end) for end in ("w1", "w2_a", "w2_b"))  # [4, 8], [8, 3], [3, 8]
W2, A1, B1 = (SITE.format(0, "k_proj", end) for end in ("w2", "w1_a", "w1_b"))  # whole, or two, by the config
Q = SITE.format(0, "q_proj", "w1")  # the first of all sites: [8, 8]
CORE = SITE.format(0, "k_proj", "t2")
TARGETS: dict[str, Any] = {"r": 3, "alpha": 4, "target_modules": ["q_proj", "k_proj"]}
WHOLE: dict[str, Any] = {W1: torch.ones(4, 8), A1: torch.ones(4, 3), B1: torch.ones(3, 8)}
CASES: dict[str, Values] = {
    "w1 whole, w2 of low rank": {"r": 3, "alpha": 4, "target_modules": "all-linear"},
    "both of low rank": {"r": 2, "alpha": 2, "target_modules": "all-linear", "decompose_both": True},
    "both whole": {"r": 8, "alpha": 6, "target_modules": "all-linear"},
    "LyCORIS's way to ask for both whole": {"r": 100_000, "alpha": 100_000, "target_modules": "all-linear"},
    "w1 whole by its size alone": {**TARGETS, "r": 5, "decompose_both": True, "decompose_factor": 4},
    "a factor that divides": {"r": 4, "alpha": 4, "target_modules": "all-linear", "decompose_factor": 2},
    "a factor beyond the root": {**TARGETS, "decompose_factor": 32, "decompose_both": True},
    "a factor that does not divide": {**TARGETS, "r": 2, "target_modules": "all-linear", "decompose_factor": 7},
    "a factor of 0": {**TARGETS, "r": 2, "decompose_factor": 0, "decompose_both": True},
    "patterns": {**TARGETS, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.self_attn.k_proj": 5}},
    "one layer": {**TARGETS, "alpha": -3, "layers_to_transform": [1]},
    "excluded": {**TARGETS, "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "what training alone needs": {**TARGETS, "rank_dropout": 0.5, "module_dropout": 0.5, "rank_dropout_scale": True},
    "an expression and the head": {**TARGETS, "target_modules": r".*(down_proj|lm_head)"},
    "another beginning": {**TARGETS, "init_weights": "lycoris"},
}
TENSORS: dict[str, TensorsCase] = {
    "w1 and its factors": ({}, WHOLE, A1, "is extra"),
    "w2 and its factors": ({}, {W2: torch.ones(8, 8)}, W2, "is extra"),
    "factors for w1": ({}, {**WHOLE, W1: None}, W1, "is missing"),
    "w1 for factors": ({"decompose_both": True}, {}, Q.replace("w1", "w1_a"), "is missing"),
    "another rank": ({"r": 2}, {}, Q.replace("w1", "w2_a"), r"shape \[8, 3\].*need \[8, 2\]"),
    "a rank that makes w2 whole": ({"r": 4}, {}, Q.replace("w1", "w2"), "is missing"),
    "another rank by a pattern": ({"rank_pattern": {"k_proj": 2}}, {}, A2, r"need \[8, 2\]"),
    "another factor": ({"decompose_factor": 2}, {}, Q, r"shape \[8, 8\].*need \[2, 2\]"),
    "a core": ({}, {CORE: torch.ones(3, 3, 1, 1)}, CORE, "LoKr of a convolution .* is not served"),
    "overflow": ({}, {W1: torch.full((4, 8), 3e38), B2: torch.full((3, 8), 9.0)}, W1, "overflows where it is"),
}  # fmt: skip
CONFIGS: dict[str, ConfigCase] = {
    "an unknown key": ({"use_scalar": True}, "a key that is not known: use_scalar"),
    "r is 0": ({"r": 0}, "r has the rank 0"),
    "r is huge": ({"r": 10**7}, "r has the rank"),
    "alpha is 0": ({"alpha": 0}, "alpha has the alpha 0"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": -1}}, "rank_pattern has the rank -1"),
    "expression as a pattern": ({"rank_pattern": {"(a+)+$": 2}}, r"rank_pattern has a key .*\(a\+\)\+\$"),
}


class TestLokr(LinearContract):
    """The Kronecker product, as two factors or whole; `SOUND` has the first matrix whole, the second of low rank."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "LOKR", "LoKr", PeftLoKrConfig, LokrConfig
    IGNORED_KEYS, SERVED_VALUES, FILL, SOUND = IGNORED_KEYS, SERVED_VALUES, staticmethod(shake(1.0)), TARGETS
    FAMILIES, FAMILY_ON = ["lokr"], [("phi3", 1), ("opt", 3), ("gemma2", 0), ("starcoder2", 5)]
    CASES, TENSORS, CONFIGS = on("llama", CASES), TENSORS, CONFIGS

    @pytest.mark.parametrize(
        ("case", "kind", "num_items"),
        [
            ({"r": 3}, LowRank, 24 * 128),  # w1 whole, of rank 8, times 3; 64 x 64
            ({"r": 2, "decompose_both": True}, LowRank, 4 * 128),
            ({"r": 3, "target_modules": ["k_proj"]}, LowRank, 12 * 96),  # w1 [4, 8] is of rank 4
            ({"r": 8}, Delta, 64 * 64),  # 8 times 8
            ({"r": 8, "decompose_factor": 1}, LowRank, 8 * 128),  # w1 is one number
            ({"r": 40, "decompose_factor": 64}, Delta, 64 * 64),  # w2 is one number, w1 whole
        ],
    )
    def test_whatever_holds_fewer_numbers_is_kept(
        self, tmp_path: Path, tiny_base: Path, case: dict[str, Any], kind: type, num_items: int
    ) -> None:
        """Two factors are kept if they have fewer numbers, else the full update."""
        config = {"alpha": case["r"], "target_modules": ["q_proj"], **case}
        patch = self.assert_answers(tiny_base, self.make(tmp_path / "hat", tiny_base, **config))
        assert {type(primitive) for primitive in patch.primitives} == {kind}
        assert patch.num_items == 2 * num_items


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 2000), st.integers(-3, 2100))
def test_sizes_are_factored_as_in_peft(size: int, factor: int) -> None:
    """Any size and any factor give PEFT's two numbers."""
    assert factorization(size, factor) == peft_factorization(size, factor)
