"""Which bases, adapters and prompts the golden answers are for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.kit.adapters import make_lora
from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED
from tests.kit.tiny import CONFIGS

HERE = Path(__file__).parent
REAL_TOKENS, TINY_TOKENS = 48, 24  # of each answer
FAMILY_TOKENS, FAMILY_SEEDS = 24, (0, 1, 2)
# Three seeds are left out: of them the oracle itself answers 4e-4 to 2e-3 beside fp64, so that fp32 does not tell.
REAL_SEEDS = {"cartridge": (0, 1, 4), "dora": (0, 1, 3), "oft": (1, 2, 3)}
# With five seeds every activation, scaling and norm of a bottleneck is there.
TINY_SEEDS = {f"bottleneck-{placement}": (0, 1, 2, 3, 4) for placement in ("houlsby", "pfeiffer", "parallel")}
REAL_STRENGTH, TINY_STRENGTH = 0.5, 0.3

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]

# Arguments of `make_lora` for the real base: every rank, placement and rule of scaling that users have.
REAL_ADAPTERS: dict[str, dict[str, Any]] = {
    "q-r1": {"r": 1, "lora_alpha": 2, "target_modules": ["q_proj"]},
    "kv-r2": {"r": 2, "lora_alpha": 4, "target_modules": ["k_proj", "v_proj"]},
    "attention-r3": {"r": 3, "lora_alpha": 16, "target_modules": ATTENTION},
    "all-r4": {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION + MLP},
    "mlp-r7": {"r": 7, "lora_alpha": 7, "target_modules": MLP},
    "all-r8": {"r": 8, "lora_alpha": 16, "target_modules": ATTENTION + MLP},
    "all-r16-rslora": {"r": 16, "lora_alpha": 16, "target_modules": ATTENTION + MLP, "use_rslora": True},
    "mlp-r33": {"r": 33, "lora_alpha": 1, "target_modules": MLP},
    "o-down-r64": {"r": 64, "lora_alpha": 128, "target_modules": ["o_proj", "down_proj"]},
    "all-patterns": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ATTENTION + MLP,
        "rank_pattern": {"q_proj": 2, "layers.3.mlp.down_proj": 33},
        "alpha_pattern": {"v_proj": 3, "layers.3.mlp.down_proj": 5},
    },
    "some-layers-r16": {
        "r": 16,
        "lora_alpha": 32,
        "target_modules": ATTENTION + MLP,
        "layers_to_transform": [0, 7, 29],
    },
    "v-patterns-rslora": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["v_proj"],
        "use_rslora": True,
        "rank_pattern": {"layers.1.self_attn.v_proj": 16},
    },
}

_TINY_TARGETS = {
    "gpt2": (["c_attn"], ["c_attn", "c_proj", "c_fc"]),
    "gpt_neox": (["query_key_value"], ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]),
    "phi": (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]),
    "phi3": (["qkv_proj"], ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]),
    "opt": (["q_proj", "v_proj"], ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]),
    "starcoder2": (["q_proj", "v_proj"], [*ATTENTION, "c_fc", "c_proj"]),
    "mixtral": (["q_proj", "v_proj"], ATTENTION),
}


def tiny_adapters(model_type: str) -> dict[str, dict[str, Any]]:
    """Arguments of `make_lora` for two adapters of a tiny type: a narrow one, and one on all that it can be on."""
    narrow, wide = _TINY_TARGETS.get(model_type, (["q_proj", "v_proj"], ATTENTION + MLP))
    extra = {"fan_in_fan_out": True} if model_type == "gpt2" else {}
    return {
        "narrow": {"r": 2, "lora_alpha": 4, "target_modules": narrow, **extra},
        "wide": {"r": 5, "lora_alpha": 8, "target_modules": wide, "use_rslora": True, **extra},
    }


def family_adapters(families: Iterable[str], is_real: bool = False) -> dict[str, dict[str, Any]]:
    """At least three artifacts of each family, by `tests.kit.families`."""
    seeds = REAL_SEEDS if is_real else TINY_SEEDS
    return {
        f"{family}-{seed}": {"family": family, "seed": seed}
        for family in families
        for seed in seeds.get(family, FAMILY_SEEDS)
    }


def make_adapters(folder: Path, base: Path, adapters: dict[str, dict[str, Any]], strength: float) -> dict[str, Path]:
    """Write each adapter to a folder of its name; a LoRA's seed is its place in the list."""
    return {
        name: _make(folder / name, base, seed, strength, config) for seed, (name, config) in enumerate(adapters.items())
    }


def _make(folder: Path, base: Path, seed: int, strength: float, config: dict[str, Any]) -> Path:
    if "family" in config:
        return {**FAMILIES, **FAMILIES_OF_BIASED}[config["family"]](folder, base, config["seed"])
    return make_lora(folder, base, seed=seed, strength=strength, **config)


def real_prompts() -> list[str]:
    """20 texts of 5 to 300 tokens of SmolLM2; PROMPTS.md says whose they are."""
    prompts: list[dict[str, str]] = json.loads((HERE / "prompts.json").read_text())
    return [prompt["text"] for prompt in prompts]


def short_prompts() -> list[str]:
    """The four shortest of them: the families are many."""
    return sorted(real_prompts(), key=len)[:4]


def tiny_prompts() -> list[str]:
    """4 texts for the byte tokenizer, two of which are longer than the sliding window."""
    texts = ["Hat?", "One base, many hats 🎩.", *real_prompts()]
    return [texts[0], texts[1], texts[2], texts[8][:150]]


TINY_TYPES = list(CONFIGS)
