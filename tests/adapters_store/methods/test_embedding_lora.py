"""LoRA on the embedding, and what PEFT saves along where embedding or head are targets, against PEFT itself."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters_store.base.spec import BaseSpec
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import LowRank, Rows
from tests.adapters_store.methods.lora_contract import LoraContract
from tests.adapters_store.methods.method_contract import split_extras
from tests.kit.adapters import make_peft
from tests.kit.families import loras
from tests.kit.like_peft import TOKENS, assert_answers_as_peft, changed

TinyOf = Callable[[str], Path]
EMBEDDING, HEAD = "base_model.model.model.embed_tokens", "base_model.model.lm_head"
A, B = EMBEDDING + ".lora_embedding_A", EMBEDDING + ".lora_embedding_B"


def fill(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """Embeddings of the tokens that training saw change by about a half; the others' columns of A stay 0."""
    noise = torch.randn(value.shape, generator=generator)
    if "lora_embedding_A" in name:
        seen = torch.zeros(value.shape[1])
        seen[TOKENS] = 1
        return seen * noise
    return 0.3 * noise if "lora_embedding_B" in name else loras.fill(name, value, generator)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "with queries": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "alone": ("llama", {"target_modules": ["embed_tokens"]}),
    "of another rank and scale": (
        "llama",
        {"target_modules": ["embed_tokens"], "rank_pattern": {"embed_tokens": 7}, "alpha_pattern": {"embed_tokens": 3}},
    ),
    "rsLoRA, with the head": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True}),
    "gemma3: scaled and tied": ("gemma3_text", {"target_modules": ["embed_tokens"]}),
    "gpt2: tied, with new biases": ("gpt2", {"target_modules": ["wte", "c_attn"], "bias": "all"}),
    "with a norm saved whole": ("opt", {"target_modules": ["embed_tokens"], "modules_to_save": ["final_layer_norm"]}),
}


@pytest.mark.parametrize(("kind", "config"), CASES.values(), ids=CASES)
def test_a_lora_on_the_embedding_answers_as_in_peft(
    tiny_of: TinyOf, tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    """The embedding of what training saw changes, in no other place: a tied head stays."""
    folder = make_peft(tmp_path / "hat", tiny_of(kind), loras.config(**config), len(kind), fill)
    patch = assert_answers_as_peft(tiny_of(kind), folder)
    (rows,) = (p for p in patch.primitives if isinstance(p, Rows))
    assert rows.ids.tolist() == sorted(set(TOKENS))


def save_as_users_do(folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
    """Write a random artifact by `save_pretrained` without any argument, which saves more."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = get_peft_model(model, loras.config(**config))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter.copy_(fill(name, parameter.clone(), generator))
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "phi"])
@pytest.mark.parametrize("targets", [["lm_head", "q_proj"], ["embed_tokens", "lm_head"]])
def test_copies_of_the_base_are_taken_and_left(tiny_of: TinyOf, tmp_path: Path, kind: str, targets: list[str]) -> None:
    """Copies of embedding and head, which PEFT saves if they are targets, are accepted and dropped."""
    folder = save_as_users_do(tmp_path / "hat", tiny_of(kind), target_modules=targets)
    assert HEAD + ".base_layer.weight" in read_folder(folder).tensors
    patch = assert_answers_as_peft(tiny_of(kind), folder)
    assert {type(p) for p in patch.primitives} <= {LowRank, Rows}


BAD: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "neither, but a target": ({}, {A: None, B: None}, r"embed_tokens\.lora_embedding_A is missing: target_modules"),
    "another rank": ({"rank_pattern": {"embed_tokens": 3}}, {}, rf"{A} has shape \[4, 259\].*need \[3, 259\]"),
    "no target": ({"target_modules": ["q_proj"]}, {}, r"embed_tokens\.lora_embedding_A is extra"),
    "dora": ({"use_dora": True}, {}, "LoRA on the embedding is not served beside use_dora"),
    "a bias": ({"lora_bias": True}, {}, "LoRA on the embedding is not served beside lora_bias"),
    "pissa": ({"init_lora_weights": "pissa"}, {}, "LoRA on the embedding is not served beside init_lora_weights"),
    "saved too": ({"modules_to_save": ["embed_tokens"]}, {}, "is not served beside modules_to_save"),
    "tokens too": ({"trainable_token_indices": [1]}, {}, "is not served beside trainable_token_indices"),
    "tied": ({"ensure_weight_tying": True}, {}, "is not served beside ensure_weight_tying"),
    "another base's embedding": (
        {},
        {EMBEDDING + ".base_layer.weight": torch.ones(259, 64)},
        rf"{EMBEDDING}\.base_layer\.weight is not as .* has it, and modules_to_save does not name it",
    ),
    "another base's head": ({}, {HEAD + ".weight": torch.ones(259, 64)}, rf"{HEAD}\.weight is not as .* has it"),
    "a larger vocabulary": ({}, {HEAD + ".weight": torch.ones(261, 64)}, rf"{HEAD}\.weight has shape \[261, 64\]"),
    "a product that overflows": ({}, {A: torch.full((4, 259), 1e30), B: torch.full((64, 4), 1e30)}, "overflows"),
}


class TestLoraOnEmbedding(LoraContract):
    """A LoRA of rank 4 on the tiny llama's embedding and queries, as users save it."""

    SOUND, MAY_MISS = {"target_modules": ["embed_tokens", "q_proj"]}, r"base_layer|lm_head"
    CASES, (TENSORS, CONFIGS) = CASES, split_extras(BAD)

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write it with the copies of the base that PEFT saves along."""
        return save_as_users_do(folder, base, seed, **config)

    def test_a_copy_in_16_bits_is_the_base(self, sound: Artifact, spec: BaseSpec) -> None:
        """A copy that was rounded to 16 bits still counts as the base's, and a missing copy is accepted."""
        name = EMBEDDING + ".base_layer.weight"
        for copy in (sound.tensors[name].bfloat16(), sound.tensors[name].half(), None):
            compile_patch(changed(sound, {}, {name: copy}), spec)

    def test_an_embedding_that_did_not_change_has_no_rows(self, sound: Artifact, spec: BaseSpec) -> None:
        """A LoRA on the embedding that is still 0 is there, and costs nothing."""
        patch = compile_patch(changed(sound, {}, {A: torch.zeros(4, 259)}), spec)
        assert {type(p) for p in patch.primitives} == {LowRank}
