"""LoHa against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoHaConfig as PeftLoHaConfig

from adapters_store.methods.loha import LohaConfig
from adapters_store.methods.shared.lycoris import IGNORED_KEYS, SERVED_VALUES
from adapters_store.primitives import Delta, LowRank
from tests.adapters_store.methods.method_contract import ConfigCase, LinearContract, TensorsCase, Values, on
from tests.kit.families.relatives import spread_loha

SITE = "base_model.model.model.layers.{}.self_attn.{}.hada_{}"
A1, B1 = SITE.format(0, "k_proj", "w1_a"), SITE.format(0, "k_proj", "w1_b")  # [32, 3], [3, 64]
A2, B2 = SITE.format(0, "k_proj", "w2_a"), SITE.format(0, "k_proj", "w2_b")
Q, CORE = SITE.format(0, "q_proj", "w1_a"), SITE.format(0, "k_proj", "t1")
TARGETS: dict[str, Any] = {"r": 3, "alpha": 2, "target_modules": ["q_proj", "k_proj"]}
CASES: dict[str, Values] = {
    "all linear": {"r": 4, "alpha": 3, "target_modules": "all-linear"},
    "whole updates": {"r": 9, "alpha": 9, "target_modules": "all-linear"},
    "rank 1": {"r": 1, "alpha": 1, "target_modules": "all-linear"},
    "patterns": {**TARGETS, "rank_pattern": {"q_proj": 7}, "alpha_pattern": {"layers.1.self_attn.k_proj": 5}},
    "anchored pattern": {**TARGETS, "rank_pattern": {"^model.layers.0.self_attn.q_proj": 2}},
    "one layer": {**TARGETS, "layers_to_transform": 1, "layers_pattern": "layers"},
    "excluded": {**TARGETS, "alpha": -8, "exclude_modules": ["layers.0.self_attn.k_proj"]},
    "what training alone needs": {**TARGETS, "rank_dropout": 0.5, "module_dropout": 0.5, "use_effective_conv2d": True},
    "an expression and the head": {**TARGETS, "target_modules": r".*(down_proj|lm_head)"},
}
TENSORS: dict[str, TensorsCase] = {
    "another rank": ({"r": 4}, {}, Q, r"shape \[64, 3\].*need \[64, 4\]"),
    "another rank by a pattern": ({"rank_pattern": {"k_proj": 2}}, {}, A1, r"need \[32, 2\]"),
    "a core": ({}, {CORE: torch.ones(3, 3, 1, 1)}, CORE, "LoHa of a convolution .* is not served"),
    "overflow": ({}, {A1: torch.full((32, 3), 3e38), A2: torch.full((32, 3), 9.0)}, A1, "overflows where it is"),
    "overflow of b": ({}, {B1: torch.full((3, 64), 3e38), B2: torch.full((3, 64), 9.0)}, B1, "overflows where it is"),
}
CONFIGS: dict[str, ConfigCase] = {
    "an unknown key": ({"use_rslora": True}, "a key that is not known: use_rslora"),
    "LoKr's key": ({"decompose_both": True}, "a key that is not known: decompose_both"),
    "r is 0": ({"r": 0}, "r has the rank 0"),
    "r is huge": ({"r": 10**19}, "r has the rank"),
    "r is absent": ({"r": None}, "missing required field `r`"),
    "alpha is 0": ({"alpha": 0}, "alpha has the alpha 0"),
    "alpha is huge": ({"alpha": 1e300}, r"alpha has the alpha 1e\+300"),
    "alpha of a pattern": ({"alpha_pattern": {"q_proj": 1e9}}, "alpha_pattern has the alpha"),
    "rank of a pattern": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern has the rank 0"),
    "expression as a pattern": ({"rank_pattern": {"(a+)+$": 2}}, r"rank_pattern has a key .*\(a\+\)\+\$"),
    "expression as alpha's": ({"alpha_pattern": {"q|k": 2}}, r"alpha_pattern has a key .*q\|k"),
}


class TestLoha(LinearContract):
    """The product of elements, as two factors or whole."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "LOHA", "LoHa", PeftLoHaConfig, LohaConfig
    IGNORED_KEYS, SERVED_VALUES, FILL, SOUND = IGNORED_KEYS, SERVED_VALUES, staticmethod(spread_loha), TARGETS
    FAMILIES, FAMILY_ON = ["loha"], [("phi3", 3), ("opt", 3), ("gemma2", 3)]
    CASES, TENSORS, CONFIGS = on("llama", CASES), TENSORS, CONFIGS

    def test_whatever_holds_fewer_numbers_is_kept(self, tmp_path: Path, tiny_base: Path) -> None:
        """Two factors of rank r^2 are kept if they have fewer numbers, else the full update."""
        for rank, kind in ((5, LowRank), (6, Delta)):  # 64 x 64: equal at rank 32
            config = {**TARGETS, "r": rank, "target_modules": ["q_proj"]}
            folder = self.make(tmp_path / str(rank), tiny_base, **config)
            patch = self.assert_answers(tiny_base, folder)
            assert {type(primitive) for primitive in patch.primitives} == {kind}
            assert patch.num_items == 2 * (25 * 128 if kind is LowRank else 64 * 64)
