"""Trainable tokens against PEFT itself, tied heads and scaled embeddings included, and all that cannot be theirs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import TrainableTokensConfig as PeftTrainableTokensConfig
from torch import Tensor

from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact, read_folder
from adapters_store.methods.compile import compile_patch
from adapters_store.methods.trainable_tokens import IGNORED_KEYS, TrainableTokensConfig
from adapters_store.primitives import Rows
from tests.adapters_store.methods.method_contract import MethodContract, TensorsCase, split_extras
from tests.kit.families.selective import make_trainable_tokens
from tests.kit.forge import spec_of
from tests.kit.like_peft import TOKENS, changed

TinyOf = Callable[[str], Path]
END = ".trainable_tokens_delta"
EMBEDDING, HEAD = "base_model.model.model.embed_tokens" + END, "base_model.model.lm_head" + END

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "three tokens, in no order": ("llama", {"token_indices": [TOKENS[0], 5, TOKENS[9]]}),
    "embedding and head, not tied": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "the head alone": ("llama", {"target_modules": ["lm_head"]}),
    "by an expression": ("llama", {"target_modules": r".*(embed_tokens|lm_head)"}),
    "random rows": ("llama", {"init_weights": False}),
    "gpt2, tied": ("gpt2", {}),
    "gpt2, the tied head alone": ("gpt2", {"target_modules": "lm_head"}),
    "opt, tied": ("opt", {"target_modules": ["embed_tokens"]}),
    "gemma2, tied, scaled after the look-up": ("gemma2", {}),
    "gemma2, the head alone": ("gemma2", {"target_modules": ["lm_head"]}),
    "gemma3, tied, scaled": ("gemma3_text", {}),
    "granite, scaled outside": ("granite", {}),
    "phi": ("phi", {}),
    "phi, whose head has a bias that PEFT leaves out": ("phi", {"target_modules": ["lm_head"]}),
}


def test_rows_are_ascending_and_a_tied_head_has_them_too(tiny_of: TinyOf, tmp_path: Path) -> None:
    """Rows come in the order of their ids; where the base is tied the head's rows are the embedding's."""
    folder = make_trainable_tokens(tmp_path / "hat", tiny_of("gpt2"), 0, token_indices=[9, 2, 4])
    patch = compile_patch(read_folder(folder), spec_of(tiny_of("gpt2")))
    rows = [primitive for primitive in patch.primitives if isinstance(primitive, Rows)]
    assert [row.site for row in rows] == ["transformer.wte", "lm_head"]
    assert all(row.ids.tolist() == [2, 4, 9] for row in rows) and torch.equal(rows[0].de, rows[1].de)


def test_a_tied_head_may_be_left_out(tiny_of: TinyOf, tmp_path: Path) -> None:
    """The head's tensor of a tied base says nothing that the embedding's does not."""
    folder = make_trainable_tokens(tmp_path / "hat", tiny_of("gpt2"), 0)
    artifact, spec = read_folder(folder), spec_of(tiny_of("gpt2"))
    whole = compile_patch(artifact, spec)
    del artifact.tensors[HEAD]
    for one, other in zip(whole.primitives, compile_patch(artifact, spec).primitives, strict=True):
        assert isinstance(one, Rows) and isinstance(other, Rows) and torch.equal(one.de, other.de)


def rows(num: int, width: int = 64) -> Tensor:
    """Make any rows [n, width]."""
    return torch.ones(num, width)


REFUSED: dict[str, TensorsCase] = {
    "missing": ({}, {EMBEDDING: None, HEAD: rows(3)}, EMBEDDING, "is missing: target_modules names"),
    "missing, by default": ({"target_modules": None}, {EMBEDDING: None, HEAD: rows(3)}, EMBEDDING, "is missing"),
    "missing, by name": (
        {"target_modules": "model.embed_tokens"},
        {EMBEDDING: None, HEAD: rows(3)},
        EMBEDDING,
        "is missing",
    ),
    "the head is missing": ({"target_modules": ["embed_tokens", "lm_head"]}, {}, HEAD, "is missing"),
    "the head is extra": ({}, {HEAD: rows(3)}, HEAD, "is extra"),
    "all-linear has no embedding": ({"target_modules": "all-linear"}, {}, EMBEDDING, "is extra"),
    "no site": ({}, {"base_model.model.model.norm" + END: rows(3)}, "base_model.model.model.norm" + END, "no site"),
    "PEFT's nested head": ({}, {f"base_model.model.lm_head.base_layer{END}": rows(3)}, "", "no site"),
    "another end": ({}, {EMBEDDING.replace(END, ".weight"): rows(3)}, "", "no site"),
    "no tokens": ({"token_indices": []}, {}, "token_indices", "is empty"),
    "no list of tokens": ({"token_indices": None}, {}, "", "missing required field `token_indices`"),
    "a token twice": ({"token_indices": [7, 3, 7]}, {}, "token_indices", "has 7 twice"),
    "a token beyond": ({"token_indices": [7, 3, 259]}, {}, "token_indices", "has 259: .* tokens 0 to 258"),
    "a negative token": ({"token_indices": [7, 3, -1]}, {}, "token_indices", "has -1"),
    "a huge token": ({"token_indices": [7, 3, 2**70]}, {}, "token_indices", "has 118"),
    "a token is a text": ({"token_indices": [7, 3, "5"]}, {}, "", r"Expected `int`.*\$\.token_indices"),
    "a token is true": ({"token_indices": [7, 3, True]}, {}, "", r"Expected `int`.*\$\.token_indices"),
    "an unknown key": ({"exclude_modules": ["lm_head"]}, {}, "exclude_modules", "a key that is not known"),
}


def test_a_tied_head_of_its_own_is_refused(tiny_of: TinyOf, tmp_path: Path) -> None:
    """Two different values of one parameter: which one PEFT would take depends on the order of loading."""
    artifact = read_folder(make_trainable_tokens(tmp_path / "hat", tiny_of("gpt2"), 0))
    artifact.tensors[HEAD] = artifact.tensors[HEAD] + 1
    with pytest.raises(ArtifactError, match=r"lm_head.*differs from .*wte.*ties its head") as caught:
        compile_patch(artifact, spec_of(tiny_of("gpt2")))
    assert caught.value.param == HEAD


class TestTrainableTokens(MethodContract):
    """The new rows stand at the embedding, at the head, or at both, as PEFT has them."""

    PEFT_TYPE, NAME, SCHEMA = "TRAINABLE_TOKENS", "trainable tokens", TrainableTokensConfig
    PEFT, IGNORED_KEYS = PeftTrainableTokensConfig, IGNORED_KEYS
    FAMILIES, SOUND = ["trainable-tokens"], {"token_indices": [7, 3, 5], "target_modules": ["embed_tokens"]}
    CASES, (TENSORS, CONFIGS) = CASES, split_extras(REFUSED)

    @classmethod
    def make(cls, folder: Path, base: Path, seed: int = 0, **config: Any) -> Path:
        """Write one, by default of half of the frequent tokens."""
        return make_trainable_tokens(folder, base, seed, **config)

    def test_a_scaled_row_that_overflows_is_refused(self, sound: Artifact, tiny_of: TinyOf) -> None:
        """Finite rows whose product with the embedding's scale is not finite are refused by name."""
        with pytest.raises(ArtifactError, match=r"embed_tokens\.trainable_tokens_delta overflows"):
            compile_patch(changed(sound, {}, {EMBEDDING: torch.full((3, 64), 1e38)}), spec_of(tiny_of("gemma2")))
