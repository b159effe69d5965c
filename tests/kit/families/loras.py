"""LoRA with what PEFT trains beside it, DoRA and AdaLoRA: random artifacts whose options vary with the seed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from tests.kit.adapters import make_peft, sort_config

STRENGTH = 0.3  # what a branch adds to an output of scale 1
SMALL_VOCABULARY = 2048  # a larger embedding is not saved whole
NORMS = ["input_layernorm", "ln_1", "final_layernorm", "final_layer_norm", "ln_f"]
VALUES = ["self_attn.v_proj", "c_proj", "out_proj"]
EMBEDDINGS = ["embed_tokens", "wte", "lm_head"]


def config(r: int = 4, **keys: Any) -> LoraConfig:
    """A LoRA on every linear, of scale 1 where `keys` say no other."""
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": r, "lora_alpha": r, "target_modules": "all-linear", **keys})


def make(folder: Path, base: Path, lora: LoraConfig, seed: int = 0) -> Path:
    """Write it, whatever it trains drawn from the seed."""
    return make_peft(folder, base, lora, seed, fill)


def fill(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Branches of `STRENGTH`, singular values about 1, and all else changed by `STRENGTH` of its size."""
    noise = torch.randn(value.shape, generator=generator)
    if ".lora_A" in name:
        fan_in: float = value.shape[1] ** 0.5
        return noise / fan_in
    if ".lora_B" in name and value.dim() > 1:
        rank: float = max(value.shape[1], 1) ** 0.5
        return STRENGTH * noise / rank
    if ".lora_E" in name:
        return 1 + STRENGTH * noise
    if value.dim() == 1 and name.endswith("weight"):  # of a norm, whose small weights stay small
        return value * (1 + STRENGTH * noise)
    return value + STRENGTH * value.square().mean().sqrt().clamp(min=0.1) * noise


def make_lora_bias(folder: Path, base: Path, seed: int) -> Path:
    """With biases of its own, and the base's in one of both ways."""
    keys = {"lora_bias": True, "bias": ("all", "lora_only")[seed % 2], "use_rslora": seed % 3 == 0}
    return make(folder, base, config(2 + seed % 3, **keys), seed)


def make_dora(folder: Path, base: Path, seed: int) -> Path:
    """DoRA, where the base has biases with new ones."""
    return make(folder, base, config(2 + 3 * (seed % 4), use_dora=True, bias=("none", "all")[seed % 2]), seed)


def make_lora_saved(folder: Path, base: Path, seed: int) -> Path:
    """With norms and a linear of each layer saved whole, the embedding and head of a small base too."""
    is_small = AutoConfig.from_pretrained(base).get_text_config().vocab_size <= SMALL_VOCABULARY
    saved = NORMS + VALUES[: 1 + seed % 3] + (EMBEDDINGS[: 1 + seed % 3] if is_small else [])
    return make(folder, base, config(2 + seed % 4, modules_to_save=saved), seed)


def make_adalora(folder: Path, base: Path, seed: int = 0, keep: float = 0.6, **keys: Any) -> Path:
    """AdaLoRA after training: of the `init_r` singular values of a site some are left, or none; `keep=1` prunes not."""
    keys = {"init_r": 4 + seed % 3, "target_modules": "all-linear", "total_step": 10, **keys}
    generator, kept = torch.Generator().manual_seed(seed), dict[str, list[bool]]()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        base_model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(base_model, AdaLoraConfig(**{"task_type": "CAUSAL_LM", "lora_alpha": 5, **keys}))
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(fill(name, parameter.detach().clone(), generator))
            if ".lora_E" in name:
                left = torch.rand(keys["init_r"], generator=generator) < keep
                kept[name.removeprefix("base_model.model.")] = left.tolist()
        model.peft_config["default"].rank_pattern = kept if keep < 1 else None
        model.save_pretrained(folder, save_embedding_layers=False)
    sort_config(folder / "adapter_config.json")
    return folder
