"""Random artifacts of the selective methods: norms, tokens, and parameters of the base in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import LNTuningConfig, TrainableTokensConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from adapters_store.base.describe import describe
from tests.kit.adapters import Fill, make_peft

NUM_TOKENS = 1024  # the first ones, which are the most frequent ones, of which half are trained
PREFIX = "base_model.model."
NORMS = ["input_layernorm", "post_attention_layernorm", "ln_1", "ln_2", "self_attn_layer_norm", "norm", "ln_f"]


def change(strength: float) -> Fill:
    """A value plus noise of `strength` times its own size."""

    def fill(_name: str, value: Tensor, generator: torch.Generator) -> Tensor:
        # Two digits of it: the sum over so many numbers differs in its last digits with the number of threads.
        size = max(0.1, float(f"{value.double().square().mean().sqrt().item():.2g}"))
        return value + strength * size * torch.randn(value.shape, generator=generator)

    return fill


def make_ln_tuning(folder: Path, base: Path, seed: int, strength: float = 0.5, **config: Any) -> Path:
    """Norms trained with PEFT, by default those of any base."""
    tuning = LNTuningConfig(task_type="CAUSAL_LM", **{"target_modules": NORMS, **config})
    return make_peft(folder, base, tuning, seed, change(strength))


def make_trainable_tokens(folder: Path, base: Path, seed: int, **config: Any) -> Path:
    """Rows of the embedding trained with PEFT, by default half of those of the frequent tokens."""
    num_tokens = min(AutoConfig.from_pretrained(base).get_text_config().vocab_size, NUM_TOKENS)
    order = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(seed))
    tokens = {"token_indices": order[: num_tokens // 2].tolist(), **config}
    return make_peft(folder, base, TrainableTokensConfig(task_type="CAUSAL_LM", **tokens), seed, change(0.7))


def make_selective(folder: Path, base: Path, seed: int, parameters: list[str], strength: float = 0.5) -> Path:
    """Write the new values of the parameters of `base` that have one of these runs of words in their names."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    generator, fill, values = torch.Generator().manual_seed(seed), change(strength), dict[str, Tensor]()
    for name, parameter in sorted(model.named_parameters()):
        if any(f".{run}." in f".{name}." for run in parameters):
            values[PREFIX + name] = fill(name, parameter.detach(), generator)
    config = {"peft_type": "SELECTIVE", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name}
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "parameters": parameters}, indent=2))
    save_file(values, folder / "adapter_model.safetensors")
    return folder


def make_selective_layer(folder: Path, base: Path, seed: int) -> Path:
    """One whole decoder layer: the last for an even seed, the one before for an odd one."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    layers = describe(model, base.name, "", base).layers
    return make_selective(folder, base, seed, [layers[-1 - seed % 2].layer])


def make_bitfit(folder: Path, base: Path, seed: int) -> Path:
    """All biases; for bases that have any (qwen2, gpt2, phi, opt, gpt_neox, starcoder2)."""
    return make_selective(folder, base, seed, ["bias"], strength=2.0)


def trained(base: Path, folder: Path) -> Any:
    """The stock model whose parameters have an artifact's values: what a selective artifact stands for."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    values = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, value in values.items():
            model.get_parameter(name.removeprefix(PREFIX)).copy_(value)
    return model
