"""AdaLoRA against PEFT itself, pruned and not, and every way in which it cannot be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.format.folder import Artifact
from adapters_store.methods.adalora import IGNORED_KEYS, SERVED_VALUES, AdaLoraConfig
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import LowRank
from tests.adapters_store.methods.method_contract import LinearContract, split_extras
from tests.kit.families import loras
from tests.kit.like_peft import changed

TinyOf = Callable[[str], Path]
SITE = "model.layers.0.self_attn.q_proj"
A, B, E = (f"base_model.model.{SITE}.lora_{matrix}" for matrix in "ABE")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "not pruned": ("llama", {"keep": 1}),
    "pruned": ("llama", {}),
    "pruned to almost nothing": ("llama", {"keep": 0.1}),
    "no alpha: the rank that is left": ("llama", {"lora_alpha": -1}),
    "keys of LoRA that AdaLoRA does not read": (
        "llama",
        {"r": 3, "use_rslora": True, "alpha_pattern": {"q_proj": 9}, "init_lora_weights": False},
    ),
    "one layer": ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "keep": 0.8}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_proj"]}),
    "new biases, a norm and the embedding whole": (
        "gpt2",
        {"target_modules": ["c_attn"], "bias": "lora_only", "modules_to_save": ["ln_f", "wte"]},
    ),
    "biases, rows of tokens": ("opt", {"bias": "all", "trainable_token_indices": list(range(0, 256, 2))}),
}


ALL = [True] * 4
BAD: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "no site": (
        {"rank_pattern": {f"{SITE}.lora_E": ALL}},
        {A: None, B: None, E: None},
        "rank_pattern has .*, which is no tensor's name",
    ),
    "another rank": ({"init_r": 5, "rank_pattern": None}, {}, rf"{A} has shape \[4, 64\].*need \[5, 64\]"),
    "less is left, it says": (
        {"rank_pattern": {f"{SITE}.lora_E": [True, False, True, True]}},
        {},
        rf"{A} has shape \[4, 64\].*need \[3, 64\]",
    ),
    "a mask of another length": ({"rank_pattern": {f"{SITE}.lora_E": [True] * 5}}, {}, "not init_r=4 values for model"),
    "a mask of numbers": ({"rank_pattern": {f"{SITE}.lora_E": [1, 1, 1, 1]}}, {}, r"Expected `bool`"),
    "a mask of no tensor": ({"rank_pattern": {f"{SITE}.lora_A": ALL}}, {}, r"lora_A, which is no tensor's name"),
    "no rank": ({"init_r": 0}, {}, "init_r is 0"),
    "a huge rank": ({"init_r": 10**9}, {}, "init_r is 1000000000"),
    "a huge alpha": ({"lora_alpha": 1e30}, {}, r"lora_alpha is 1e\+30"),
    "a product that overflows": ({}, {A: torch.full((4, 64), 1e30), E: torch.full((4, 1), 1e30)}, rf"{A} overflows"),
}


class TestAdalora(LinearContract):
    """Pruned and not; of `SOUND` every singular value is left."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "ADALORA", "AdaLoRA", PeftAdaLoraConfig, AdaLoraConfig
    IGNORED_KEYS, SERVED_VALUES, SOUND = (
        IGNORED_KEYS,
        SERVED_VALUES,
        {"target_modules": ["q_proj"], "init_r": 4, "keep": 1},
    )
    UNTRAINED = "lora_E"
    FAMILIES, FAMILY_ON = ["adalora"], [("llama", seed) for seed in range(3)]
    CASES, (TENSORS, CONFIGS) = CASES, split_extras(BAD)

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write one as it is after training."""
        return loras.make_adalora(folder, base, seed, **config)

    def test_a_site_without_a_rank_has_no_branch(self, sound: Artifact, spec: BaseSpec) -> None:
        """A site that was pruned to rank 0 has no update, whatever its empty tensors look like."""
        pattern = {f"{SITE}.lora_E": [False] * 4}
        empty = {A: torch.ones(0, 64), B: torch.ones(64, 0), E: torch.ones(0, 1)}
        patch = compile_patch(changed(sound, {"rank_pattern": pattern}, empty), spec)
        sites = [p.site for p in patch.primitives if isinstance(p, LowRank)]
        assert sites == [SITE.replace("layers.0", "layers.1")] and len(patch.primitives) == 1
