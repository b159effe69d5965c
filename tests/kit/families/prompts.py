"""Random artifacts whose hat is positions: soft prompts, and prefixes of keys and values."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import (
    CartridgeConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
)
from torch import Tensor

from tests.kit.adapters import make_peft, shake

TASK_TYPE = "CAUSAL_LM"
MIN_TOKENS, MAX_TOKENS = 3, 40
FIRST_ID = 40  # of a context's token ids, which every base has
OTHERS = 1000  # seeds of cartridges, which would be prefixes of the same numbers


def num_tokens(seed: int) -> int:
    """How many virtual tokens an artifact of this seed has: 3 to 40, other numbers for seeds near by."""
    return MIN_TOKENS + 17 * seed % (MAX_TOKENS - MIN_TOKENS + 1)


def make_prompt_tuning(folder: Path, base: Path, seed: int) -> Path:
    """A soft prompt."""
    config = PromptTuningConfig(task_type=TASK_TYPE, num_virtual_tokens=num_tokens(seed))
    return make_peft(folder, base, config, seed, fill=shake(3.0))


def make_p_tuning(folder: Path, base: Path, seed: int) -> Path:
    """A soft prompt that an encoder made, an MLP or an LSTM by turns."""
    kind = ("MLP", "LSTM")[seed % 2]
    config = PromptEncoderConfig(
        task_type=TASK_TYPE,
        num_virtual_tokens=num_tokens(seed),
        encoder_hidden_size=16,
        encoder_reparameterization_type=kind,
    )
    return make_peft(folder, base, config, seed)


def make_multitask(folder: Path, base: Path, seed: int) -> Path:
    """A soft prompt and a task's low-rank factor of it."""
    config = MultitaskPromptTuningConfig(
        task_type=TASK_TYPE, num_virtual_tokens=num_tokens(seed), num_ranks=1 + seed % 3
    )
    return make_peft(folder, base, config, seed, fill=factors)


def make_cpt(folder: Path, base: Path, seed: int) -> Path:
    """A context whose embeddings were moved, farther than by default."""
    ids = list(range(FIRST_ID, FIRST_ID + num_tokens(seed)))
    config = CPTConfig(
        task_type=TASK_TYPE,
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=[token % 4 for token in ids],
        opt_projection_epsilon=3.0,
        opt_projection_format_epsilon=5.0,
    )
    return make_peft(folder, base, config, seed)


def make_prefix_tuning(folder: Path, base: Path, seed: int) -> Path:
    """Keys and values, every other seed's made by a projection."""
    config = PrefixTuningConfig(
        task_type=TASK_TYPE,
        num_virtual_tokens=num_tokens(seed),
        prefix_projection=bool(seed % 2),
        encoder_hidden_size=24,
    )
    return make_peft(folder, base, config, seed, fill=cached)


def make_cartridge(folder: Path, base: Path, seed: int) -> Path:
    """Keys and values, the first of them frozen in training."""
    config = CartridgeConfig(task_type=TASK_TYPE, num_virtual_tokens=num_tokens(seed), num_frozen_tokens=seed % 3)
    return make_peft(folder, base, config, OTHERS + seed, fill=cached)


def cached(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Keys and values of scale 1, however wide a row is; a projection's matrices, which give as much."""
    return shake(1.5)(name, value, generator) if "transform" in name else torch.randn(value.shape, generator=generator)


def factors(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Embeddings of scale 0.2 and factors of scale 1."""
    return (0.2 if "embedding" in name else 1.0) * torch.randn(value.shape, generator=generator)
