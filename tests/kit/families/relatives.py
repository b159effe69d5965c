"""LoRA's relatives and (IA)3: their options vary with the seed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, VeraConfig
from torch import Tensor

from tests.kit.adapters import make_peft, shake

FEEDFORWARD = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h")
QUERIES = ("q_proj", "qkv_proj", "c_attn", "query_key_value")


def make_vera(folder: Path, base: Path, seed: int) -> Path:
    """Every linear of the layers; in every second one the projections are left to be drawn again."""
    rank, is_saved = 2 + 4 * (seed % 3), seed % 2 == 0
    config = vera_config(r=rank, projection_prng_key=seed, save_projection=is_saved, **_everywhere())
    return make_peft(folder, base, config, seed, fill=noise)


def make_loha(folder: Path, base: Path, seed: int) -> Path:
    """Ranks whose squares are low, and one that is compiled whole."""
    rank = (2, 5, 3, 8)[seed % 4]
    config = LoHaConfig(r=rank, alpha=rank, rank_pattern={"k_proj": 2}, **_everywhere())
    return make_peft(folder, base, config, seed, fill=spread_loha)


def make_lokr(folder: Path, base: Path, seed: int) -> Path:
    """Both matrices of low rank, or the first whole; factors near the root, or a small first one."""
    rank = (2, 3, 8)[seed % 3]
    factor = (-1, 4)[seed % 2]
    config = LoKrConfig(r=rank, alpha=rank, decompose_both=seed % 4 < 2, decompose_factor=factor, **_everywhere())
    return make_peft(folder, base, config, seed, fill=shake(1.0))


def make_ia3(folder: Path, base: Path, seed: int) -> Path:
    """Keys, values and more by the seed at their output, the feed-forward's last (odd seeds: q too) at its input."""
    output, feedforward = ["k_proj", "v_proj", "o_proj", "up_proj"][: 2 + seed % 3], list(FEEDFORWARD)
    (feedforward if seed % 2 else output).extend(QUERIES)
    config = IA3Config(task_type="CAUSAL_LM", target_modules=output + feedforward, feedforward_modules=feedforward)
    return make_peft(folder, base, config, seed, fill=around_one)


def vera_config(**values: Any) -> VeraConfig:
    """A config of VeRA, without PEFT's warning that other systems may draw other projections."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return VeraConfig(**{"task_type": "CAUSAL_LM", **values})


def _everywhere() -> dict[str, str]:
    return {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}


def noise(_name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Every number anew, of scale 0.7."""
    return 0.7 * torch.randn(value.shape, generator=generator)


def around_one(_name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Scales between a half and twice, mostly."""
    return torch.exp(0.4 * torch.randn(value.shape, generator=generator))


def spread_loha(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Factors whose product of elements has rows of length 1, as one product is of scale 1."""
    last = 1 if "hada_w2_b" in name else value.shape[-1]
    return torch.randn(value.shape, generator=generator) / last**0.5
