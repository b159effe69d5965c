"""Prefixes of keys and values against PEFT itself and against text, and all that cannot be laid out in this base."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import CartridgeConfig, PrefixTuningConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from adapters_store.base.spec import BaseSpec, KVShape
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods import is_kv
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.prefix_tuning import CARTRIDGE_IGNORED_KEYS, PREFIX_IGNORED_KEYS, KVConfig
from adapters_store.methods.prompt_tuning import EMBEDDINGS, SERVED_VALUES
from adapters_store.primitives import Patch, PrefixKV
from tests.adapters_store.methods.method_contract import ConfigCase, MethodContract, TensorsCase
from tests.kit import reference
from tests.kit.forge import spec_of, toy_artifact, toy_spec
from tests.kit.like_peft import TOKENS, assert_answers_as_peft

TinyOf = Callable[[str], Path]
# Grouped heads (llama), windows that a prefix of 37 fills (mistral, gemma), soft caps (gemma2), two rotary bases
# (gemma3), heads wider than hidden / heads (qwen3), learned positions (gpt2, opt), a rotary part (gpt_neox, phi).
BASES = ["mistral", "gemma2", "gemma3_text", "qwen3", "gpt2", "opt", "gpt_neox", "phi"]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gpt2"])
def test_the_cache_of_a_text_answers_as_the_text(tiny_of: TinyOf, kind: str) -> None:
    """A prefix that is a text's keys and values is that text: keys lie rotated, and positions go on behind them."""
    model, spec, text = AutoModelForCausalLM.from_pretrained(tiny_of(kind)), spec_of(tiny_of(kind)), [7, 8, 9, 7, 1]
    cache = DynamicCache()
    with torch.inference_mode():
        model(torch.tensor([text]), past_key_values=cache, use_cache=True)
    sides = [side[0].transpose(0, 1).flatten(1) for layer in cache.layers for side in (layer.keys, layer.values)]
    config = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": len(text)}
    patch = compile_patch(toy_artifact(config, {EMBEDDINGS: torch.cat(sides, dim=1)}), spec)
    ours = reference.logits(model, [(patch, 1.0)], TOKENS)
    assert (ours - reference.logits(model, [], text + TOKENS)[len(text) :]).abs().max() < 1e-4


T, LAYERS, HEADS, DIM = 3, 2, 2, 4
WIDTH = LAYERS * 2 * HEADS * DIM
TYPES = {
    "prefix": ("PREFIX_TUNING", PrefixTuningConfig, PREFIX_IGNORED_KEYS),
    "cartridge": ("CARTRIDGE", CartridgeConfig, CARTRIDGE_IGNORED_KEYS),
}


def kv_spec(*shapes: KVShape) -> BaseSpec:
    """A base of two layers with two kv heads of four, or of other shapes."""
    return dataclasses.replace(toy_spec(), kv=list(shapes) or [KVShape(HEADS, DIM, DIM)] * LAYERS)


def prefix(name: str = "prefix", changes: dict[str, Any] | None = None, **tensors: Tensor | None) -> Artifact:
    """A sound artifact whose numbers count up; None takes a tensor away."""
    sizes = {"num_virtual_tokens": T, "num_layers": LAYERS, "num_attention_heads": HEADS, "token_dim": HEADS * DIM}
    found = {EMBEDDINGS: torch.arange(float(T * WIDTH)).view(T, WIDTH), **tensors}
    kept = {name: tensor for name, tensor in found.items() if tensor is not None}
    return toy_artifact({"peft_type": TYPES[name][0], **sizes, **(changes or {})}, kept)


@pytest.mark.parametrize("name", TYPES)
def test_a_row_is_layer_then_key_and_value_then_head(name: str) -> None:
    """The numbers of a row, in order, are layer 0's key, its value, layer 1's key and so on, each head by head."""
    patch = compile_patch(prefix(name), kv_spec())
    (kv,) = patch.primitives
    assert isinstance(kv, PrefixKV) and len(kv.keys) == len(kv.values) == LAYERS
    for layer in range(LAYERS):
        for which, side in enumerate((kv.keys[layer], kv.values[layer])):
            assert side.shape == (T, HEADS, DIM) and side.is_contiguous()
            for token in range(T):
                first = token * WIDTH + (layer * 2 + which) * HEADS * DIM
                assert side[token].flatten().tolist() == list(range(first, first + HEADS * DIM))
    assert patch.num_items == patch.num_parameters == T * WIDTH


def test_halves_become_whole() -> None:
    """Numbers in 16 bits become fp32."""
    (kv,) = compile_patch(
        prefix("prefix", None, **{EMBEDDINGS: torch.ones(T, WIDTH, dtype=torch.bfloat16)}), kv_spec()
    ).primitives
    assert isinstance(kv, PrefixKV) and kv.keys[0].dtype == kv.values[0].dtype == torch.float32


CONFIGS: dict[str, ConfigCase] = {
    "query heads": ({"num_attention_heads": 4}, "num_attention_heads=4: toy has 2; .*another base", "wrong_base"),
    "the stream's width": ({"token_dim": 16}, "token_dim=16: toy has 8", "wrong_base"),
    "more layers": ({"num_layers": 4}, "num_layers=4: toy has 2", "wrong_base"),
    "more tokens": ({"num_virtual_tokens": 4}, r"has shape \[3, 32\].*need \[4, 32\]", "artifact_invalid"),
    "no tokens": ({"num_virtual_tokens": 0}, "num_virtual_tokens=0", "artifact_invalid"),
    "all positions": ({"num_virtual_tokens": 64}, "num_virtual_tokens=64", "artifact_invalid"),
    "an encoder-decoder": ({"num_transformer_submodules": 2}, "num_transformer_submodules=2", "method_unsupported"),
    "an unknown key": ({"prefix_magic": 1}, "a key that is not known: prefix_magic", "method_unsupported"),
}


TENSORS: dict[str, TensorsCase] = {
    "extra": ({}, {"transform.0.weight": torch.ones(8, 8)}, "transform.0.weight", "is extra"),
    "four dimensions": ({}, {EMBEDDINGS: torch.ones(T, LAYERS, 2, 8)}, EMBEDDINGS, r"shape \[3, 2, 2, 8\]"),
    "not folded": ({}, {EMBEDDINGS: torch.ones(T, HEADS * DIM)}, EMBEDDINGS, r"shape \[3, 8\].*need \[3, 32\]"),
    "another base": ({}, {EMBEDDINGS: torch.ones(T, 2 * WIDTH)}, EMBEDDINGS, r"shape \[3, 64\].*need \[3, 32\]"),
}


@pytest.mark.parametrize(
    "shapes",
    [[KVShape(2, 4, 4), KVShape(1, 8, 8)], [KVShape(2, 4, 6)] * 2],
    ids=["layers differ", "values are wider than keys"],
)
def test_a_base_that_rows_of_one_shape_cannot_lay_out(shapes: list[KVShape]) -> None:
    """PEFT's rows have one shape for all layers, keys and values: where the base has more, nothing is guessed."""
    with pytest.raises(ArtifactError, match="keys and values of one shape in all layers of toy") as caught:
        compile_patch(prefix(), kv_spec(*shapes))
    assert caught.value.code == "method_unsupported"


class TestPrefixTuning(MethodContract):
    """3, 20 and 37 virtual tokens, a projection folded, on every kind of attention."""

    KIND: ClassVar[str] = "prefix"
    NAME, SCHEMA, SERVED_VALUES = "prefix tuning", KVConfig, SERVED_VALUES
    PEFT_TYPE, PEFT, IGNORED_KEYS = TYPES["prefix"]
    UNTRAINED = "$^"  # virtual tokens change something from the start
    FAMILIES, TENSORS, CONFIGS = ["prefix-tuning"], TENSORS, CONFIGS
    FAMILY_ON = tuple([("llama", seed) for seed in (0, 1, 2)] + [(kind, seed) for kind in BASES for seed in (1, 2)])

    @pytest.fixture(scope="class")
    @classmethod
    def sound(cls) -> Artifact:
        """A prefix whose numbers count up."""
        return prefix(cls.KIND)

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> BaseSpec:
        """A base of two layers."""
        return kv_spec()

    def assert_answers(self, base: Path, folder: Path) -> Patch:
        """Compare the logits with PEFT's, and the number of virtual tokens with the kit's."""
        patch = assert_answers_as_peft(base, folder)
        assert patch.num_virtual == read_folder(folder).config["num_virtual_tokens"] in (3, 20, 37)
        assert is_kv(patch.method)
        return patch

    def test_all_that_peft_writes_by_default_is_taken(self, spec: BaseSpec) -> None:
        """PEFT's defaults, all written out, are no reason to refuse."""
        config = self.PEFT(task_type="CAUSAL_LM", num_virtual_tokens=T).to_dict()
        compile_patch(prefix(self.KIND, {**config, "peft_type": self.PEFT_TYPE}), spec)


class TestCartridge(TestPrefixTuning):
    """The same, the first of them frozen in training."""

    KIND, NAME, (PEFT_TYPE, PEFT, IGNORED_KEYS) = "cartridge", "a cartridge", TYPES["cartridge"]
    FAMILIES, FAMILY_ON = ["cartridge"], tuple(("llama", seed) for seed in (0, 1, 2))
