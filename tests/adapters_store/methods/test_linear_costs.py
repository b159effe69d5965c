"""The costs of a config and of a base add up: they are never multiplied, whatever key is long."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from adapters_store.methods.compile import compile_patch
from tests.kit.forge import PREFIX, RANK, toy_artifact, toy_config, toy_spec
from tests.kit.steps import CountedText, count_steps

NAMES, LAYERS = (20, 60), (2, 10)


def long_config(key: str, num_names: int) -> dict[str, Any]:
    """A config of the toy with so many more names, or numbers, under a key."""
    names = [CountedText(f"zz{number:03}.k_proj") for number in range(num_names)]
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
    tensors = {
        f"{PREFIX}{site}.{end}": torch.ones(shape)
        for site, linear in spec.linears.items()
        if site != "lm_head"
        for end, shape in (
            ("lora_A.weight", (RANK, linear.in_features)),
            ("lora_B.weight", (linear.out_features, RANK)),
        )
    }
    artifact = toy_artifact(long_config(key, num_names), tensors)
    return count_steps(lambda: compile_patch(artifact, spec))


@pytest.mark.parametrize(
    "key",
    [
        "alpha_pattern",
        "exclude_modules",
        "layers_pattern",
        "layers_to_transform",
        "modules_to_save",
        "rank_pattern",
        "target_modules",
    ],
)
def test_names_and_layers_are_not_multiplied(key: str) -> None:
    """What more names cost is the same for a base of two layers and for one of ten."""
    few, many = (cost(key, NAMES[1], layers) - cost(key, NAMES[0], layers) for layers in LAYERS)
    assert few == many
