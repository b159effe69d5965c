"""Layer-norm tuning against PEFT itself, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig as PeftLNTuningConfig

from adapters_store.errors import ArtifactError
from adapters_store.format.folder import read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.ln_tuning import LNTuningConfig
from tests.adapters_store.methods.method_contract import MethodContract, TensorsCase, split_extras
from tests.kit.families.selective import make_ln_tuning
from tests.kit.forge import spec_of

TinyOf = Callable[[str], Path]
NORM, OTHER_NORM = "base_model.model.model.norm", "base_model.model.model.layers.0.input_layernorm"
WEIGHT, BIAS = ".ln_tuning_layers.weight", ".ln_tuning_layers.bias"

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"target_modules": None}),
    "one norm": ("llama", {"target_modules": ["norm"]}),
    "excluded": ("llama", {"exclude_modules": ["layers.1.input_layernorm"]}),
    "by an expression": ("llama", {"target_modules": r".*layers\.\d\.input_layernorm"}),
    "excluded by an expression": ("llama", {"exclude_modules": r".*\.0\..*"}),
    "a linear, the embedding and the head": (
        "llama",
        {"target_modules": ["norm", "o_proj", "embed_tokens", "lm_head"]},
    ),
    "the head saved whole": ("llama", {"modules_to_save": ["lm_head"]}),
    "a feed-forward block saved whole": ("llama", {"modules_to_save": ["layers.1.mlp"]}),
    "targeted and saved: saved": ("llama", {"target_modules": ["norm", "o_proj"], "modules_to_save": ["1.self_attn"]}),
    "gpt2, norms with biases": ("gpt2", {"target_modules": None}),
    "gpt2, a transposed linear": ("gpt2", {"target_modules": ["ln_f", "h.0.attn.c_attn"]}),
    "gpt2, the tied head alone": ("gpt2", {"modules_to_save": ["lm_head"]}),
    "gpt2, the tied embedding alone": ("gpt2", {"target_modules": ["ln_f", "wte"]}),
    "gemma2, whose norms add 1": ("gemma2", {"target_modules": None}),
    "gemma2, the scaled embedding": ("gemma2", {"modules_to_save": ["embed_tokens"]}),
    "phi": ("phi", {"target_modules": None}),
    "opt": ("opt", {"target_modules": ["self_attn_layer_norm", "final_layer_norm"]}),
    "qwen3, norms of queries and keys": ("qwen3", {"target_modules": ["q_norm", "k_norm"]}),
    "olmo2, norms after the blocks": ("olmo2", {"target_modules": ["post_feedforward_layernorm", "q_norm"]}),
}


REFUSED: dict[str, TensorsCase] = {
    "extra": ({"target_modules": ["norm"]}, {}, OTHER_NORM + WEIGHT, "is extra"),
    "excluded": ({"exclude_modules": ["input_layernorm"]}, {}, OTHER_NORM + WEIGHT, "is extra"),
    "a bias that the base has not": ({}, {NORM + BIAS: torch.ones(64)}, NORM + BIAS, "is extra"),
    "a whole block": (
        {},
        {"base_model.model.model.layers.0.mlp.ln_tuning_layers.default.up_proj.weight": torch.ones(96, 64)},
        "",
        "no site in llama",
    ),
    "the base's own name": ({}, {NORM + ".weight": torch.ones(64)}, NORM + ".weight", "no site in llama"),
    "saved, without its tensor": (
        {"modules_to_save": ["lm_head"]},
        {},
        "base_model.model.lm_head.weight",
        "lm_head.weight is missing",
    ),
    "saved as one name": ({"modules_to_save": "lm_head"}, {}, "", r"Expected `array.*\$\.modules_to_save"),
    "a key of LoRA": ({"layers_to_transform": [0]}, {}, "layers_to_transform", "a key that is not known"),
}


def test_a_missing_bias_is_refused(tiny_of: TinyOf, tmp_path: Path) -> None:
    """A norm that has a bias is whole only with it."""
    artifact = read_folder(make_ln_tuning(tmp_path / "hat", tiny_of("gpt2"), 0))
    name = f"base_model.model.transformer.ln_f{BIAS}"
    del artifact.tensors[name]
    with pytest.raises(ArtifactError, match=rf"{name} is missing"):
        compile_patch(artifact, spec_of(tiny_of("gpt2")))


def test_an_untrained_artifact_is_refused(tiny_of: TinyOf, tmp_path: Path) -> None:
    """Norms that are the base's own make no adapter."""
    artifact = read_folder(make_ln_tuning(tmp_path / "hat", tiny_of("llama"), 0, strength=0.0))
    with pytest.raises(ArtifactError, match="every tensor is as llama has it"):
        compile_patch(artifact, spec_of(tiny_of("llama")))


class TestLNTuning(MethodContract):
    """Norms and whatever else was targeted or saved act as PEFT's copies of them."""

    PEFT_TYPE, NAME, PEFT, SCHEMA = "LN_TUNING", "layer-norm tuning", PeftLNTuningConfig, LNTuningConfig
    FAMILIES, CASES = ["ln-tuning"], CASES
    SOUND, (TENSORS, CONFIGS) = {"target_modules": ["model.norm", "layers.0.input_layernorm"]}, split_extras(REFUSED)

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write one, by default of the norms of any base."""
        return make_ln_tuning(folder, base, seed, **config)
