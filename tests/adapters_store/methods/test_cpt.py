"""Context-aware prompt tuning against PEFT itself, and contexts that do not fit their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CPTConfig
from torch import Tensor
from transformers import AutoModelForCausalLM

from adapters_store.format.folder import Artifact
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.cpt import IGNORED_KEYS
from adapters_store.methods.prompt_tuning import EMBEDDINGS, VirtualTokens
from adapters_store.primitives import Patch, PrefixEmbeds
from tests.adapters_store.methods.method_contract import ConfigCase, TensorsCase
from tests.adapters_store.methods.test_prompt_tuning import CONFIGS as SOFT_CONFIGS
from tests.adapters_store.methods.test_prompt_tuning import SIZE, SoftContract, T, prompt_spec
from tests.kit.families.prompts import FIRST_ID
from tests.kit.forge import toy_artifact


def config(**changes: Any) -> dict[str, Any]:
    """Return PEFT's config, with changes."""
    lists = {key: [1, 2, 3] for key in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")}
    return {**CPTConfig(task_type="CAUSAL_LM", **lists).to_dict(), "peft_type": "CPT", **changes}


@pytest.mark.parametrize("key", ["cpt_mask", "cpt_tokens_type_mask"])
def test_masks_that_are_left_out_are_no_matter(key: str) -> None:
    """Masks are of the loss and of the projection: PEFT fills in what is left out."""
    compile_patch(toy_artifact(config(**{key: None}), {EMBEDDINGS: torch.ones(T, SIZE)}), prompt_spec())


CONFIGS: dict[str, ConfigCase] = {
    "fewer ids than tokens": ({"cpt_token_ids": [1, 2]}, "cpt_token_ids is no list of 3 items"),
    "no ids": ({"cpt_token_ids": None}, "cpt_token_ids is no list of 3 items"),
    "ids as a text": ({"cpt_token_ids": "123"}, "cpt_token_ids is no list of 3 items"),
    "a longer mask": ({"cpt_mask": [1] * 4}, "cpt_mask is no list of 3 items"),
    "a shorter mask of types": ({"cpt_tokens_type_mask": []}, "cpt_tokens_type_mask is no list of 3 items"),
    "another base": ({"token_dim": 9}, "token_dim=9: toy has 8"),
}
CHANGE = "delta_embedding.weight"  # that was not added in
TENSORS: dict[str, TensorsCase] = {"the change beside the sum": ({}, {CHANGE: torch.ones(T, SIZE)}, CHANGE, "is extra")}


class TestCPT(SoftContract):
    """The saved tensor is the context with its projected change, which was trained and is no text."""

    NAME, PEFT_TYPE, PEFT, SCHEMA, IGNORED_KEYS = "CPT", "CPT", CPTConfig, VirtualTokens, IGNORED_KEYS
    JUDGED = ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")
    FAMILIES, TENSORS, CONFIGS = ["cpt"], TENSORS, SOFT_CONFIGS | CONFIGS
    FAMILY_ON = (("llama", 0), ("llama", 1), ("llama", 2), ("gemma3_text", 1), ("gpt2", 2))

    @pytest.fixture(scope="class")
    @classmethod
    def sound(cls) -> Artifact:
        """A context of three tokens, with all that PEFT writes."""
        return toy_artifact(config(), {EMBEDDINGS: torch.ones(T, SIZE)})

    def assert_answers(self, base: Path, folder: Path, **inputs: Tensor) -> Patch:
        """Compare the logits with PEFT's, and see that the context moved."""
        patch = super().assert_answers(base, folder, **inputs)
        ids = torch.arange(FIRST_ID, FIRST_ID + patch.num_virtual)
        context = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings()(ids)
        assert isinstance(patch.prefix, PrefixEmbeds) and (patch.prefix.embeds - context).abs().max() > 0.01
        return patch

    def test_all_that_peft_writes_by_default_is_taken(self) -> None:
        """PEFT's defaults, all written out, are no reason to refuse."""
        patch = compile_patch(toy_artifact(config(), {EMBEDDINGS: torch.ones(T, SIZE)}), prompt_spec())
        assert (patch.method, patch.num_virtual) == ("cpt", T)
