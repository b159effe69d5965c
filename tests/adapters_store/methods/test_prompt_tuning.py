"""Soft prompts against PEFT itself and against text, and every way in which config, tensors and base can disagree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import MultitaskPromptTuningConfig, PromptEncoderConfig, PromptTuningConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.prompt_tuning import (
    COLS,
    EMBEDDINGS,
    ENCODER_IGNORED_KEYS,
    MULTITASK_IGNORED_KEYS,
    PROMPT_IGNORED_KEYS,
    ROWS,
    SERVED_VALUES,
    MultitaskConfig,
    VirtualTokens,
)
from adapters_store.primitives import Patch, PrefixEmbeds
from tests.adapters_store.methods.method_contract import ConfigCase, MethodContract, TensorsCase
from tests.kit import reference
from tests.kit.adapters import make_peft
from tests.kit.families import FAMILIES
from tests.kit.forge import spec_of, toy_artifact, toy_spec
from tests.kit.like_peft import TOKENS, assert_answers_as_peft
from tests.kit.tiny import CONFIGS as TINY_CONFIGS
from tests.kit.tiny import make_tiny_base

TinyOf = Callable[[str], Path]
TASK = torch.tensor([0])
# Scaled embeddings, a scale outside of them, learned positions, and windows that the longer prompts fill.
OTHER_BASES = ["gemma2", "gemma3_text", "granite", "gpt2", "mistral", "opt"]


def test_embeddings_narrower_than_the_stream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a base widens its embeddings (OPT), virtual tokens are as wide as those."""
    monkeypatch.setitem(TINY_CONFIGS, "opt", {**TINY_CONFIGS["opt"], "word_embed_proj_dim": 32})
    base = make_tiny_base(tmp_path / "opt", "opt")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, token_dim=32)
    patch = assert_answers_as_peft(base, make_peft(tmp_path / "hat", base, config))
    assert patch.num_items == 5 * 32


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3_text"])
def test_the_embeddings_of_a_text_answer_as_the_text(tiny_of: TinyOf, kind: str) -> None:
    """A prompt that is a text's embeddings is that text: positions and phases go on behind it."""
    model, spec, text = AutoModelForCausalLM.from_pretrained(tiny_of(kind)), spec_of(tiny_of(kind)), [7, 8, 9, 7]
    embeds = model.get_input_embeddings()(torch.tensor(text)).detach()
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": len(text)}
    patch = compile_patch(toy_artifact(config, {EMBEDDINGS: embeds}), spec)
    ours = reference.logits(model, [(patch, 1.0)], TOKENS)
    assert (ours - reference.logits(model, [], text + TOKENS)[len(text) :]).abs().max() < 1e-4


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() & {"prompt-tuning", "p-tuning", "multitask-prompt-tuning"}))
def test_families_have_many_lengths(tiny_base: Path, tmp_path: Path, name: str) -> None:
    """The kit's families have 3 to 40 virtual tokens, by the seed, and the same bytes for the same seed."""
    folders = [FAMILIES[name](tmp_path / str(seed), tiny_base, seed) for seed in (3, 4, 5)]
    patches = [compile_patch(read_folder(folder), spec_of(tiny_base)) for folder in folders]
    assert len({patch.num_virtual for patch in patches}) == 3
    assert all(3 <= patch.num_virtual <= 40 for patch in patches)
    again = FAMILIES[name](tmp_path / "again", tiny_base, 4)
    assert read_folder(again).digest == patches[1].digest


T, SIZE = 3, 8
TYPES = {
    "prompt": ("PROMPT_TUNING", PromptTuningConfig, VirtualTokens, PROMPT_IGNORED_KEYS),
    "p": ("P_TUNING", PromptEncoderConfig, VirtualTokens, ENCODER_IGNORED_KEYS),
    "multitask": ("MULTITASK_PROMPT_TUNING", MultitaskPromptTuningConfig, MultitaskConfig, MULTITASK_IGNORED_KEYS),
}


def prompt_spec() -> BaseSpec:
    """A base whose embeddings are of another size than its stream."""
    return dataclasses.replace(toy_spec(), hidden_size=16, embedding_size=SIZE)


def soft(name: str, changes: dict[str, Any] | None = None, **tensors: Tensor | None) -> Artifact:
    """Make a sound artifact of three virtual tokens, with rank 2 if it has ranks; None takes a tensor away."""
    config: dict[str, Any] = {"peft_type": TYPES[name][0], "num_virtual_tokens": T, "token_dim": SIZE, "num_layers": 2}
    found: dict[str, Tensor | None] = {EMBEDDINGS: torch.arange(24.0).view(T, SIZE)}
    if name == "multitask":
        config |= {"num_tasks": 1, "num_ranks": 2}
        found |= {COLS: torch.full((1, T, 2), 0.5), ROWS: torch.full((1, 2, SIZE), 2.0)}
    kept = {name: tensor for name, tensor in {**found, **tensors}.items() if tensor is not None}
    return toy_artifact({**config, **(changes or {})}, kept)


def compiled(artifact: Artifact) -> Patch:
    """Its patch for that base."""
    return compile_patch(artifact, prompt_spec())


@pytest.mark.parametrize("name", TYPES)
def test_a_patch_is_one_prefix_of_embeddings(name: str) -> None:
    """What compiles is the embeddings, in fp32, whatever they were saved in; the parameters are those of the file."""
    artifact = soft(name)
    halves = {key: tensor.half() for key, tensor in artifact.tensors.items()}
    patch = compiled(dataclasses.replace(artifact, tensors=halves))
    (prefix,) = patch.primitives
    assert isinstance(prefix, PrefixEmbeds) and prefix.embeds.dtype == torch.float32
    assert torch.equal(prefix.embeds, torch.arange(24.0).view(T, SIZE) * (2.0 if name == "multitask" else 1.0))
    assert (patch.num_virtual, patch.num_items) == (T, T * SIZE)
    assert patch.num_parameters == sum(tensor.numel() for tensor in halves.values())


CONFIGS: dict[str, ConfigCase] = {
    "no tokens": ({"num_virtual_tokens": 0}, "num_virtual_tokens=0", "artifact_invalid"),
    "all positions": ({"num_virtual_tokens": 64}, "num_virtual_tokens=64: toy has 64 positions", "artifact_invalid"),
    "a huge number": ({"num_virtual_tokens": 10**30}, "num_virtual_tokens", "artifact_invalid"),
    "how many is not said": ({"num_virtual_tokens": None}, "required field `num_virtual_tokens`", "artifact_invalid"),
    "more than there are": (
        {"num_virtual_tokens": 4},
        r"prompt_embeddings has shape \[3, 8\].*\[4, 8\]",
        "artifact_invalid",
    ),
    "another width": ({"token_dim": 16}, "token_dim=16: toy has 8; the artifact is of another base", "wrong_base"),
    "more layers": ({"num_layers": 12}, "num_layers=12: toy has 2", "wrong_base"),
    "an encoder-decoder": ({"num_transformer_submodules": 2}, "num_transformer_submodules=2", "method_unsupported"),
    "an unknown key": ({"prompt_magic": 1}, "a key that is not known: prompt_magic", "method_unsupported"),
}


SPOILED: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "extra": ("prompt", {"prompt_encoder": torch.ones(1)}, "prompt_encoder", "is extra"),
    "an encoder": ("p", {"mlp_head.0.weight": torch.ones(8, 8)}, "mlp_head.0.weight", "is extra"),
    "factors of no task": ("prompt", {COLS: torch.ones(1, T, 1)}, COLS, "is extra"),
    "an overflow": ("multitask", {ROWS: torch.full((1, 2, SIZE), 3e38)}, EMBEDDINGS, "overflows"),
}


@pytest.mark.parametrize(("key", "value"), [("num_tasks", 2), ("num_tasks", 0), ("num_ranks", 0), ("num_ranks", 10**9)])
def test_a_prompt_of_many_tasks_is_refused(key: str, value: int) -> None:
    """A prompt of many tasks does not say which one is meant: refused, with how to save one."""
    with pytest.raises(ArtifactError, match=f"{key}={value}") as caught:
        compiled(soft("multitask", {key: value}))
    assert caught.value.param == key
    assert key == "num_ranks" or "save that task's item of prefix_task_cols" in str(caught.value)


@pytest.mark.parametrize("key", ["num_tasks", "num_ranks"])
def test_counts_that_are_left_out_are_one(key: str) -> None:
    """A count that the config leaves out has PEFT's default."""
    ones = {COLS: torch.ones(1, T, 1), ROWS: torch.ones(1, 1, SIZE)}
    compiled(soft("multitask", {"num_tasks": 1, "num_ranks": 1, key: None}, **ones))


class SoftContract(MethodContract):
    """The laws of a prompt of three virtual tokens, for a base whose embeddings are of another size than its stream."""

    KIND: ClassVar[str]
    UNTRAINED = "$^"  # virtual tokens change something from the start
    SERVED_VALUES, CONFIGS = SERVED_VALUES, CONFIGS

    @pytest.fixture(scope="class")
    @classmethod
    def sound(cls) -> Artifact:
        """A prompt of this kind."""
        return soft(cls.KIND)

    @pytest.fixture(scope="class")
    @classmethod
    def spec(cls) -> BaseSpec:
        """The spec of that base."""
        return prompt_spec()

    def assert_answers(self, base: Path, folder: Path, **inputs: Tensor) -> Patch:
        """Compare the logits with PEFT's, and the number of virtual tokens with the kit's."""
        patch = assert_answers_as_peft(base, folder, **inputs)
        assert patch.num_virtual == read_folder(folder).config["num_virtual_tokens"] in (3, 20, 37)
        return patch

    def test_all_that_peft_writes_by_default_is_taken(self) -> None:
        """PEFT's defaults, all written out, are no reason to refuse."""
        config = self.PEFT(task_type="CAUSAL_LM", num_virtual_tokens=T).to_dict()
        ranks = {"num_ranks": 2} if self.KIND == "multitask" else {}
        compiled(soft(self.KIND, {**config, **ranks, "peft_type": self.PEFT_TYPE}))


def spoiled_of(kind: str) -> dict[str, TensorsCase]:
    """The rows of one kind of prompt."""
    return {name: ({}, tensors, param, reason) for name, (of, tensors, param, reason) in SPOILED.items() if of == kind}


class TestPromptTuning(SoftContract):
    """A prompt that is what was trained."""

    KIND, NAME, (PEFT_TYPE, PEFT, SCHEMA, IGNORED_KEYS) = "prompt", "prompt tuning", TYPES["prompt"]
    FAMILIES, TENSORS = ["prompt-tuning"], spoiled_of("prompt")
    FAMILY_ON = tuple([("llama", seed) for seed in (0, 1, 2)] + [(kind, 2) for kind in OTHER_BASES])


class TestPTuning(SoftContract):
    """A prompt that an encoder made."""

    KIND, NAME, (PEFT_TYPE, PEFT, SCHEMA, IGNORED_KEYS) = "p", "p-tuning", TYPES["p"]
    FAMILIES, TENSORS, FAMILY_ON = ["p-tuning"], spoiled_of("p"), [("llama", seed) for seed in (0, 1, 2)]


class TestMultitask(SoftContract):
    """A prompt with its task's factors."""

    KIND, NAME, (PEFT_TYPE, PEFT, SCHEMA, IGNORED_KEYS) = "multitask", "multitask prompt tuning", TYPES["multitask"]
    FAMILIES, FAMILY_ON = ["multitask-prompt-tuning"], [("llama", seed) for seed in (0, 1, 2)]
    TENSORS = spoiled_of("multitask")

    def assert_answers(self, base: Path, folder: Path, **inputs: Tensor) -> Patch:
        """Compare with PEFT's model, which must be told the task."""
        return super().assert_answers(base, folder, task_ids=TASK, **inputs)
