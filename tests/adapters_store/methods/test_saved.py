"""What is trained beside a LoRA's branches - biases, modules saved whole, rows of tokens - against PEFT itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters_store.errors import ArtifactError
from adapters_store.format.folder import read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.primitives import Bias, Delta, LowRank, Rows, Scale
from tests.adapters_store.methods.lora_contract import LoraContract
from tests.adapters_store.methods.method_contract import split_extras
from tests.kit.adapters import make_peft
from tests.kit.families import loras
from tests.kit.forge import spec_of
from tests.kit.like_peft import TOKENS, assert_answers_as_peft, changed

TinyOf = Callable[[str], Path]
PREFIX = "base_model.model."
SOME, OTHERS = sorted(set(TOKENS[:9])), sorted(set(TOKENS[5:12]))
QUERIES: dict[str, Any] = {"target_modules": ["q_proj"]}
GPT2: dict[str, Any] = {"target_modules": ["c_attn"]}

BIASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2, those of the branches": ("gpt2", {"bias": "lora_only"}),
    "gpt2, all": ("gpt2", {"bias": "all", **GPT2}),
    "gpt2, all and the branches' own": ("gpt2", {"bias": "all", "lora_bias": True, "lora_alpha": 7}),
    "llama has none, its branches do": ("llama", {"bias": "all", "lora_bias": True, "use_rslora": True}),
    "opt, all": ("opt", {"bias": "all", "target_modules": ["fc1"]}),
    "starcoder2, all": ("starcoder2", {"bias": "all"}),
    "phi, its head too": ("phi", {"bias": "all", "lora_bias": True, "target_modules": ["lm_head", "q_proj"]}),
    "qwen2, those of the branches, some have none": ("qwen2", {"bias": "lora_only"}),
}
SAVED: dict[str, tuple[str, dict[str, Any]]] = {
    "head, embedding, norms and a linear": (
        "llama",
        {"modules_to_save": ["lm_head", "embed_tokens", "norm", "k_proj"]},
    ),
    "the embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "a linear that is a target too": ("llama", {"target_modules": "all-linear", "modules_to_save": ["v_proj"]}),
    "a target by an expression": ("llama", {"target_modules": ".*_proj", "modules_to_save": ["v_proj", "up_proj"]}),
    "a whole layer": ("llama", {"modules_to_save": ["layers.1"]}),
    "by a whole name, and one that is not there": ("llama", {"modules_to_save": ["model.norm", "score"]}),
    "none": ("llama", {"modules_to_save": []}),
    "Conv1D and norms with biases": ("gpt2", {"modules_to_save": ["mlp", "ln_f"], **GPT2}),
    "the embedding of a tied head alone": ("gpt2", {"modules_to_save": ["wte"], **GPT2}),
    "a tied head alone": ("gpt2", {"modules_to_save": ["lm_head"], **GPT2}),
    "tied names that PEFT does not tie": (
        "gpt2",
        {"modules_to_save": ["wte"], "ensure_weight_tying": True, **GPT2},
    ),
    "a scaled embedding, norms of 1 + w": ("gemma3_text", {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "tied by the embedding": ("gemma3_text", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "tied by the head": ("gemma3_text", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "tied in vain": ("llama", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True}),
    "a head with a bias, beside biases": ("phi", {"modules_to_save": ["lm_head"], "bias": "lora_only"}),
    "beside all biases": ("gpt2", {"modules_to_save": ["wte"], "bias": "all", **GPT2}),
    "beside all biases, with its own": ("gpt2", {"modules_to_save": ["mlp", "ln_f"], "bias": "all", **GPT2}),
    "post-norms": ("olmo2", {"modules_to_save": ["post_feedforward_layernorm", "o_proj"]}),
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "the embedding's": ("llama", {"trainable_token_indices": SOME}),
    "embedding's and head's": ("llama", {"trainable_token_indices": {"embed_tokens": SOME[::-1], "lm_head": OTHERS}}),
    "tied": ("gemma3_text", {"trainable_token_indices": SOME}),
    "tied, and said to be": ("gemma3_text", {"trainable_token_indices": SOME, "ensure_weight_tying": True}),
    "tied, named twice": ("gemma3_text", {"trainable_token_indices": {"embed_tokens": SOME, "lm_head": SOME}}),
    "tied, but others": ("gemma3_text", {"trainable_token_indices": {"embed_tokens": SOME, "lm_head": OTHERS}}),
    "a tied head's alone": ("gemma3_text", {"trainable_token_indices": {"lm_head": OTHERS}}),
    "phi's head loses its bias": ("phi", {"trainable_token_indices": {"lm_head": OTHERS}}),
    "gpt2, beside all biases": ("gpt2", {"trainable_token_indices": {"wte": SOME}, "bias": "all", **GPT2}),
    "beside norms": ("opt", {"trainable_token_indices": SOME, "modules_to_save": ["final_layer_norm"]}),
}


def test_what_is_saved_becomes_what_it_changes(tiny_of: TinyOf, tmp_path: Path) -> None:
    """A linear is a delta and a bias, a norm a scale and a bias, an embedding rows; a kind is at a site once."""
    lora = loras.config(**GPT2, modules_to_save=["mlp.c_fc", "ln_1", "wte"], lora_bias=True)
    folder = loras.make(tmp_path / "hat", tiny_of("gpt2"), lora)
    primitives = compile_patch(read_folder(folder), spec_of(tiny_of("gpt2"))).primitives
    kinds = {(type(p), getattr(p, "site", "").rpartition(".")[2]) for p in primitives}
    assert kinds == {
        *((LowRank, "c_attn"), (Bias, "c_attn"), (Delta, "c_fc"), (Bias, "c_fc"), (Scale, "ln_1"), (Bias, "ln_1")),
        (Rows, "wte"),
    }
    assert len(primitives) == len({(type(p), getattr(p, "site", "")) for p in primitives})


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {**QUERIES, "modules_to_save": ["embed_tokens", "norm", "k_proj"]}),
        ("gpt2", {**GPT2, "modules_to_save": ["wte", "ln_f", "c_fc"]}),
    ],
)
def test_what_is_saved_as_the_base_has_it_costs_nothing(
    tiny_of: TinyOf, tmp_path: Path, kind: str, config: dict[str, Any]
) -> None:
    """Modules that were saved untrained make no primitives, nor do rows that did not move; the door lets them in."""

    def fill(name: str, value: Tensor, generator: torch.Generator) -> Tensor:
        value = loras.fill(name, value, generator) if "lora_" in name else value
        if "embed_tokens" in name or "wte" in name:
            value[[SOME[0], SOME[2]]] += 1
        return value

    folder = make_peft(tmp_path / "hat", tiny_of(kind), loras.config(**config), fill=fill)
    primitives = assert_answers_as_peft(tiny_of(kind), folder).primitives
    assert {type(p) for p in primitives} == {LowRank, Rows}
    assert [p.ids.tolist() for p in primitives if isinstance(p, Rows)] == [[SOME[0], SOME[2]]]


BRANCH, NORM = PREFIX + "transformer.h.0.attn.c_attn", PREFIX + "transformer.ln_f"
EMBEDDING, OTHER = PREFIX + "transformer.wte.weight", PREFIX + "transformer.h.0.ln_1.bias"
BASE_BIAS, OWN_BIAS = BRANCH + ".base_layer.bias", BRANCH + ".lora_B.bias"
BAD: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "a bias beside": ({}, {OTHER: torch.ones(64)}, rf"{OTHER} has no site"),
    "all biases are said to be there": ({"bias": "all"}, {}, r"\.bias is missing"),
    "biases are said not to be there": ({"bias": "none"}, {}, r"c_attn\.base_layer\.bias has no site"),
    "no bias of the branches, it says": ({"lora_bias": False}, {}, r"c_attn\.lora_B\.bias has no site"),
    "an unknown kind of bias": ({"bias": "some"}, {}, r"Invalid enum value 'some'.*\$\.bias"),
    "nothing is saved, it says": (
        {"modules_to_save": None},
        {},
        r"wte\.weight is not as gpt2 has it, and modules_to_save",
    ),
    "more is saved, it says": ({"modules_to_save": ["ln_f", "wte", "ln_1"]}, {}, r"ln_1\.weight is missing"),
    "the branch is saved, it says": ({"modules_to_save": ["ln_f", "wte", "c_attn"]}, {}, r"c_attn\.weight is missing"),
    "saved is a text": ({"modules_to_save": "wte"}, {}, r"\$\.modules_to_save"),
    "saved has a nameless one": ({"modules_to_save": [""]}, {}, "none empty"),
    "saved has too many": ({"modules_to_save": ["wte"] * 3000}, {}, "at most 2048 names"),
    "tied, it says": (
        {"ensure_weight_tying": True, "modules_to_save": ["ln_f", "lm_head"]},
        {},
        "lm_head.* is missing",
    ),
    "tokens too": ({"trainable_token_indices": [1]}, {}, r"transformer\.wte is in modules_to_save and in trainable"),
}


TOKEN_ROWS = PREFIX + "model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD_ROWS = PREFIX + "lm_head.token_adapter.trainable_tokens_delta"
TOKENS_KEY = "trainable_token_indices"
BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "another number of rows": ({TOKENS_KEY: [1, 2]}, {}, rf"{TOKEN_ROWS} has shape \[3, 64\].*need \[2, 64\]"),
    "no tokens, it says": ({TOKENS_KEY: None}, {}, rf"{TOKEN_ROWS} has no site"),
    "no tokens": ({TOKENS_KEY: []}, {}, f"{TOKENS_KEY} is empty"),
    "a token twice": ({TOKENS_KEY: [7, 5, 7]}, {}, f"{TOKENS_KEY} has 7 twice"),
    "no such token": ({TOKENS_KEY: [7, 5, 259]}, {}, f"{TOKENS_KEY} has 259: .* has the tokens 0 to 258"),
    "a token before the first": ({TOKENS_KEY: [7, 5, -1]}, {}, f"{TOKENS_KEY} has -1"),
    "true for a token": ({TOKENS_KEY: [7, 5, True]}, {}, r"Expected `int`"),
    "neither embedding nor head": (
        {TOKENS_KEY: {"norm": [7, 5, 9]}},
        {},
        "has norm, which is not one embedding or head",
    ),
    "a name twice": (
        {TOKENS_KEY: {"embed_tokens": [7, 5, 9], "model.embed_tokens": [7, 5, 9]}},
        {},
        "has model.embed_tokens, which",
    ),
    "others for a tied head": (
        {TOKENS_KEY: {"embed_tokens": [7, 5, 9], "lm_head": [1]}, "ensure_weight_tying": True},
        {HEAD_ROWS: torch.ones(1, 64)},
        "differ for embedding and head",
    ),
    "a tied head's own": ({}, {HEAD_ROWS: torch.ones(3, 64)}, rf"{HEAD_ROWS} has no site"),
}


def test_two_values_of_a_tied_weight_are_refused(tiny_of: TinyOf, tmp_path: Path) -> None:
    """With ensure_weight_tying the head is the embedding; a file that has two of them is not what was trained."""
    lora = loras.config(**QUERIES, modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    artifact = read_folder(loras.make(tmp_path / "hat", tiny_of("gemma3_text"), lora))
    with pytest.raises(ArtifactError, match=r"lm_head\.weight differs from .*embed_tokens\.weight"):
        compile_patch(
            changed(artifact, {}, {PREFIX + "lm_head.weight": torch.ones(259, 64)}), spec_of(tiny_of("gemma3_text"))
        )


class TestLoraSaved(LoraContract):
    """A LoRA on gpt2 with a norm and the embedding saved whole, and biases of the branches."""

    BASE, SOUND = "gpt2", {**GPT2, "modules_to_save": ["ln_f", "wte"], "bias": "lora_only", "lora_bias": True}
    CASES, (TENSORS, CONFIGS) = BIASES | SAVED, split_extras(BAD)
    FAMILIES, FAMILY_ON = ["lora-bias"], [("llama", seed) for seed in range(3)]

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write one on the queries, if the config does not say others."""
        queries = QUERIES if "q_proj" in "".join(spec_of(base).linears) else {}
        return super().make(folder, base, seed, **{**queries, **config})


class TestLoraRows(TestLoraSaved):
    """A LoRA on gemma3, which is tied, with rows of three tokens."""

    BASE, SOUND = "gemma3_text", {**QUERIES, TOKENS_KEY: [7, 5, 9]}
    CASES, (TENSORS, CONFIGS) = ROWS, split_extras(BAD_ROWS)
    FAMILIES, FAMILY_ON = ["lora-saved"], [("llama", seed) for seed in range(3)]
