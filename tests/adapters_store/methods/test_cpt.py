"""Context-aware prompt tuning against PEFT itself, and contexts that do not fit their tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import CPTConfig
from transformers import AutoModelForCausalLM

from adapters_store.errors import ArtifactError
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.cpt import IGNORED_KEYS
from adapters_store.methods.prompt_tuning import EMBEDDINGS, SERVED_VALUES, VirtualTokens
from adapters_store.primitives import PrefixEmbeds
from tests.adapters_store.methods.test_prompt_tuning import SIZE, T, prompt_spec
from tests.kit.families.prompts import FIRST_ID, make_cpt
from tests.kit.forge import toy_artifact
from tests.kit.like_peft import assert_answers_as_peft, assert_every_key_is_judged

TinyOf = Callable[[str], Path]


@pytest.mark.parametrize(("kind", "seed"), [("llama", 0), ("llama", 1), ("llama", 2), ("gemma3_text", 1), ("gpt2", 2)])
def test_a_moved_context_answers_as_in_peft(tiny_of: TinyOf, tmp_path: Path, kind: str, seed: int) -> None:
    """What is saved is the context with its projected change, which was made by training and is no text."""
    patch = assert_answers_as_peft(tiny_of(kind), make_cpt(tmp_path / "hat", tiny_of(kind), seed))
    ids = torch.arange(FIRST_ID, FIRST_ID + patch.num_virtual)
    context = AutoModelForCausalLM.from_pretrained(tiny_of(kind)).get_input_embeddings()(ids)
    assert isinstance(patch.prefix, PrefixEmbeds) and (patch.prefix.embeds - context).abs().max() > 0.01


def config(**changes: Any) -> dict[str, Any]:
    """What PEFT writes, with changes."""
    lists = {key: [1, 2, 3] for key in ("cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask")}
    return {**CPTConfig(task_type="CAUSAL_LM", **lists).to_dict(), "peft_type": "CPT", **changes}


def test_every_key_that_peft_writes_is_judged() -> None:
    """No key of the installed PEFT's CPTConfig is unknown here, and all of them together are taken."""
    assert_every_key_is_judged(CPTConfig, VirtualTokens, IGNORED_KEYS, SERVED_VALUES)
    patch = compile_patch(toy_artifact(config(), {EMBEDDINGS: torch.ones(T, SIZE)}), prompt_spec())
    assert (patch.method, patch.num_virtual) == ("cpt", T)


@pytest.mark.parametrize("key", ["cpt_mask", "cpt_tokens_type_mask"])
def test_masks_that_are_left_out_are_no_matter(key: str) -> None:
    """Masks are of the loss and of the projection: PEFT fills in what is left out."""
    compile_patch(toy_artifact(config(**{key: None}), {EMBEDDINGS: torch.ones(T, SIZE)}), prompt_spec())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "fewer ids than tokens": ({"cpt_token_ids": [1, 2]}, "cpt_token_ids is no list of 3 items"),
    "no ids": ({"cpt_token_ids": None}, "cpt_token_ids is no list of 3 items"),
    "ids as a text": ({"cpt_token_ids": "123"}, "cpt_token_ids is no list of 3 items"),
    "a longer mask": ({"cpt_mask": [1] * 4}, "cpt_mask is no list of 3 items"),
    "a shorter mask of types": ({"cpt_tokens_type_mask": []}, "cpt_tokens_type_mask is no list of 3 items"),
    "more tokens than rows": ({"num_virtual_tokens": 4}, r"prompt_embeddings has shape \[3, 8\].*need \[4, 8\]"),
    "another base": ({"token_dim": 9}, "token_dim=9: toy has 8"),
    "another task": ({"task_type": "SEQ_CLS"}, "CPT with task_type=SEQ_CLS is not served"),
    "modules to save": ({"modules_to_save": ["lm_head"]}, "CPT with modules_to_save=.* is not served"),
    "an unknown key": ({"cpt_magic": 1}, "a key that is not known: cpt_magic"),
}


@pytest.mark.parametrize(("changes", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_context_that_does_not_fit_is_refused(changes: dict[str, Any], reason: str) -> None:
    """A list of the context must have an item for each virtual token; the sentence names it."""
    with pytest.raises(ArtifactError, match=reason):
        compile_patch(toy_artifact(config(**changes), {EMBEDDINGS: torch.ones(T, SIZE)}), prompt_spec())


@pytest.mark.parametrize("tensors", [{}, {"delta_embedding.weight": torch.ones(T, SIZE)}], ids=["missing", "extra"])
def test_the_saved_sum_is_the_only_tensor(tensors: dict[str, torch.Tensor]) -> None:
    """The sum must be there, and a change that was not added in is refused."""
    found = {**tensors, **({EMBEDDINGS: torch.ones(T, SIZE)} if tensors else {})}
    with pytest.raises(ArtifactError, match=r"is missing|delta_embedding\.weight is extra"):
        compile_patch(toy_artifact(config(), found), prompt_spec())
