"""BEFT against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from typing import Any

import torch
from peft import BeftConfig as PeftBeftConfig

from adapters_store.methods.beft import IGNORED_KEYS, SERVED_VALUES, BeftConfig
from tests.adapters_store.methods.method_contract import ConfigCase, LinearContract, TensorsCase, Values, on
from tests.kit.families.relatives import noise

Q = "base_model.model.model.layers.0.self_attn.q_proj.bias"
TARGETS: dict[str, Any] = {"target_modules": ["q_proj", "k_proj"]}
TENSORS: dict[str, TensorsCase] = {"another method's": ({}, {Q: torch.ones(64)}, Q, "no site in")}
CASES: dict[str, Values] = {
    "all linear": {"target_modules": "all-linear"},
    "two a layer": TARGETS,
    "an expression and the head": {"target_modules": r".*(down_proj|lm_head)", "init_weights": False},
}
CONFIGS: dict[str, ConfigCase] = {
    "a key of its relatives": ({"bias": "none"}, "a key that is not known: bias"),
    "targets are a number": ({"target_modules": 3}, r"\$\.target_modules"),
}


class TestBeft(LinearContract):
    """Biases, also at linears that have none in the base."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "BEFT", "BEFT", PeftBeftConfig, BeftConfig
    IGNORED_KEYS, SERVED_VALUES, FILL, SOUND = IGNORED_KEYS, SERVED_VALUES, staticmethod(noise), TARGETS
    FAMILIES, FAMILY_ON = ["beft"], [("phi3", 0), ("opt", 1), ("gemma2", 2)]
    CASES, TENSORS, CONFIGS = on("llama", CASES), TENSORS, CONFIGS
