"""DoRA against PEFT itself: magnitudes by the norms of the base's own weights, its biases made good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters_store.base.spec import BaseSpec
from adapters_store.base.weights import base_weight
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import Bias, LowRank, Scale
from tests.adapters_store.methods.lora_contract import LoraContract
from tests.adapters_store.methods.method_contract import split_extras
from tests.kit.families import loras
from tests.kit.forge import spec_of
from tests.kit.like_peft import changed

TinyOf = Callable[[str], Path]
SITE = "base_model.model.model.layers.0.self_attn.q_proj"
A, B, MAGNITUDE = SITE + ".lora_A.weight", SITE + ".lora_B.weight", SITE + ".lora_magnitude_vector"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "another scale": (
        "llama",
        {"r": 5, "lora_alpha": 9, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"k_proj": 1}},
    ),
    "rsLoRA, the head too": ("llama", {"use_rslora": True, "target_modules": ["lm_head", "q_proj"]}),
    "gpt2: Conv1D, with biases": ("gpt2", {}),
    "gpt2, its tied head": ("gpt2", {"target_modules": ["lm_head", "c_proj"]}),
    "gpt2, new biases": ("gpt2", {"bias": "all"}),
    "opt, new biases where branches are": ("opt", {"bias": "lora_only", "target_modules": ["q_proj", "fc1"]}),
    "qwen2: biases on some": ("qwen2", {}),
    "phi: the head has a bias": ("phi", {"bias": "all", "target_modules": ["lm_head", "dense", "fc2"]}),
    "phi3: fused": ("phi3", {}),
    "gemma3": ("gemma3_text", {}),
    "on what PiSSA left": ("llama", {"init_lora_weights": "pissa", "target_modules": ["v_proj", "o_proj"]}),
    "on what OLoRA left": ("qwen2", {"init_lora_weights": "olora", "target_modules": ["v_proj", "o_proj"]}),
    "beside a norm saved whole": ("gpt_neox", {"modules_to_save": ["final_layer_norm"]}),
}


def test_a_site_has_one_primitive_of_a_kind(tiny_of: TinyOf, tmp_path: Path) -> None:
    """Magnitude, branch and all that concerns a bias are three primitives; without a bias they are two."""
    folder = loras.make(tmp_path / "hat", tiny_of("gpt2"), loras.config(use_dora=True, bias="all"))
    primitives = compile_patch(read_folder(folder), spec_of(tiny_of("gpt2"))).primitives
    kinds = {type(p) for p in primitives if not isinstance(p, LowRank | Scale | Bias)}
    places = [(type(p), p.site) for p in primitives if isinstance(p, LowRank | Scale | Bias)]
    assert not kinds and len(places) == len(set(places))
    folder = loras.make(tmp_path / "other", tiny_of("llama"), loras.config(use_dora=True))
    assert {type(p) for p in compile_patch(read_folder(folder), spec_of(tiny_of("llama"))).primitives} == {
        LowRank,
        Scale,
    }


BAD: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "another rank": ({"r": 3}, {}, rf"{A} has shape \[4, 64\].*need \[3, 64\]"),
    "no dora": ({"use_dora": False}, {}, rf"{MAGNITUDE} has no site"),
    "a bias too": ({"lora_bias": True}, {}, "PEFT has no lora_bias with use_dora"),
    "a base's bias that is not": ({}, {SITE + ".base_layer.bias": torch.ones(64)}, rf"{SITE}\.base_layer\.bias has no"),
}


class TestDora(LoraContract):
    """Magnitudes by the norms of the base's own weights, its biases made good."""

    FAMILIES, FAMILY_ON = ["dora"], [("llama", seed) for seed in range(3)]
    SOUND, CASES = {"target_modules": ["q_proj"]}, CASES
    TENSORS, CONFIGS = split_extras(BAD)

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write a LoRA with magnitudes."""
        return super().make(folder, base, seed, use_dora=True, **config)

    def test_a_row_without_a_direction_is_refused(self, sound: Artifact, spec: BaseSpec) -> None:
        """A row of the base's weight that A and B cancel has no direction to give a magnitude to: refused."""
        a, b = torch.zeros(4, 64), torch.zeros(64, 4)
        a[0], b[0, 0] = base_weight(spec, "model.layers.0.self_attn.q_proj.weight")[0], -1
        with pytest.raises(ArtifactError, match=r"q_proj\.lora_magnitude_vector overflows"):
            compile_patch(changed(sound, {}, {A: a, B: b}), spec)
