"""The costs of a config and of a base add up: they are never multiplied, whatever key is long."""

from __future__ import annotations

import contextlib
import tracemalloc
from typing import Any

import pytest
import torch

from adapters_store.base.spec import BaseSpec
from adapters_store.errors import ArtifactError
from adapters_store.format.folder import Artifact
from adapters_store.methods.compile import compile_patch
from tests.kit.forge import PREFIX, RANK, toy_artifact, toy_config, toy_spec
from tests.kit.steps import CountedText, count_steps

NAMES, LAYERS = (20, 60), (2, 10)
MANY_NAMES, LONG_NAME = 2000, 100_000
KEYS = [
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "rank_pattern",
    "target_modules",
]


def long_config(key: str, num_names: int, num_chars: int = 0) -> dict[str, Any]:
    """A config of the toy with so many more names, or numbers, under a key; the last name has so many characters."""
    texts = [f"zz{number:03}.k_proj" for number in range(num_names)]
    names = [CountedText(text) for text in [*texts[:-1], texts[-1].rjust(num_chars, "z")]]
    values: dict[str, Any] = {
        "target_modules": ["q_proj", "k_proj", *names],
        "rank_pattern": dict.fromkeys(names, 3),
        "alpha_pattern": dict.fromkeys(names, 3),
        "layers_to_transform": list(range(num_names)),
        "layers_pattern": [*names, "layers"],
    }
    also = {"layers_to_transform": list(range(max(LAYERS)))} if key == "layers_pattern" else {}
    return toy_config(**also, **{key: values.get(key, names)})


def cost(key: str, num_names: int, num_layers: int) -> int:
    """The steps of compiling a toy of so many layers by a config with so many names."""
    spec = toy_spec(num_layers)
    artifact = layered_artifact(long_config(key, num_names), spec)
    return count_steps(lambda: compile_patch(artifact, spec))


def layered_artifact(config: dict[str, Any], spec: BaseSpec) -> Artifact:
    """An artifact with tensors of ones for every layer of a toy."""
    tensors = {
        f"{PREFIX}{site}.{end}": torch.ones(shape)
        for site, linear in spec.linears.items()
        if site != "lm_head"
        for end, shape in (
            ("lora_A.weight", (RANK, linear.in_features)),
            ("lora_B.weight", (linear.out_features, RANK)),
        )
    }
    return toy_artifact(config, tensors)


@pytest.mark.parametrize("key", KEYS)
def test_names_and_layers_are_not_multiplied(key: str) -> None:
    """What more names cost is the same for a base of two layers and for one of ten."""
    few, many = (cost(key, NAMES[1], layers) - cost(key, NAMES[0], layers) for layers in LAYERS)
    assert few == many


def most_bytes(key: str, num_names: int, num_chars: int) -> int:
    """The most memory that compiling a toy takes, by a config with so many names of which one has so many characters.

    A name in vain is refused under some keys, which costs, too.
    """
    spec = toy_spec()
    artifact = layered_artifact(long_config(key, num_names, num_chars), spec)
    tracemalloc.start()
    try:
        with contextlib.suppress(ArtifactError):
            compile_patch(artifact, spec)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("key", KEYS)
def test_names_and_their_length_are_not_multiplied(key: str) -> None:
    """A long name takes as much memory beside many others as alone: a few of itself."""
    few, many = (most_bytes(key, names, LONG_NAME) - most_bytes(key, names, 0) for names in (1, MANY_NAMES))
    assert max(few, many) < 10 * LONG_NAME
