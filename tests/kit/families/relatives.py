"""LoRA's relatives, (IA)3, OFT, MiSS and BEFT: their options vary with the seed."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import BeftConfig, IA3Config, LoHaConfig, LoKrConfig, MissConfig, OFTConfig, VeraConfig
from torch import Tensor

from tests.kit.adapters import Fill, make_peft, shake

FEEDFORWARD = ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h")
QUERIES = ("q_proj", "qkv_proj", "c_attn", "query_key_value")


def make_vera(folder: Path, base: Path, seed: int) -> Path:
    """Every linear of the layers; in every second one the projections are left to be drawn again."""
    rank, is_saved = 2 + 4 * (seed % 3), seed % 2 == 0
    config = vera_config(r=rank, projection_prng_key=seed, save_projection=is_saved, **_everywhere())
    return make_peft(folder, base, config, seed, fill=noise)


def make_loha(folder: Path, base: Path, seed: int) -> Path:
    """Ranks whose squares are low, and one that is compiled whole for the tiny bases."""
    rank = (2, 3, 4, 6)[seed % 4]
    config = LoHaConfig(r=rank, alpha=rank, rank_pattern={"k_proj": 2}, **_everywhere())
    return make_peft(folder, base, config, seed, fill=spread_loha)


def make_lokr(folder: Path, base: Path, seed: int) -> Path:
    """Both matrices of low rank, with factors near the root, or a small and whole first one."""
    rank, is_both = (2, 3, 4)[seed % 3], seed % 2 == 0
    factor = -1 if is_both else 4
    config = LoKrConfig(r=rank, alpha=rank, decompose_both=is_both, decompose_factor=factor, **_everywhere())
    return make_peft(folder, base, config, seed, fill=shake(1.0))


def make_oft(folder: Path, base: Path, seed: int) -> Path:
    """Queries turned by the series or exactly, in blocks of their own or all alike."""
    size, is_series = (8, 4, 16)[seed % 3], seed % 2 == 0
    config = OFTConfig(
        task_type="CAUSAL_LM",
        target_modules=list(QUERIES),
        oft_block_size=size,
        block_share=seed % 4 > 1,
        use_cayley_neumann=is_series,
    )
    return make_peft(folder, base, config, seed, fill=scaled(0.1))


def make_miss(folder: Path, base: Path, seed: int) -> Path:
    """Whole sums, and those that are repeated over the output."""
    config = MissConfig(r=2 + 3 * (seed % 3), init_weights="mini" if seed % 2 else True, mini_r=8, **_everywhere())
    return make_peft(folder, base, config, seed, fill=scaled(0.05))


def make_beft(folder: Path, base: Path, seed: int) -> Path:
    """A bias on every linear of the layers."""
    return make_peft(folder, base, BeftConfig(**_everywhere()), seed, fill=noise)


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


def scaled(scale: float) -> Fill:
    """Every number anew, of this scale."""
    return lambda _name, value, generator: scale * torch.randn(value.shape, generator=generator)


noise = scaled(0.7)


def around_one(_name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Scales between a half and twice, mostly."""
    return torch.exp(0.4 * torch.randn(value.shape, generator=generator))


def spread_loha(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Factors whose product of elements has rows of length 1, as one product is of scale 1."""
    root: float = (1 if "hada_w2_b" in name else value.shape[-1]) ** 0.5
    return torch.randn(value.shape, generator=generator) / root
