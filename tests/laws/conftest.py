"""Tiny bases in fp32: one with LoRAs of many ranks and placements, one with two artifacts of every family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kit.adapters import make_lora
from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED
from tests.laws.world import World, load_tiny

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
PLACES = [ATTENTION, MLP, [*ATTENTION, *MLP], ["q_proj"], ["down_proj"], ["v_proj", "o_proj"]]
RANKS = (1, 2, 3, 4, 7, 8, 16, 33)
SEEDS = {"A": 0, "B": 33}  # prefixes of 3 and of 32 tokens: inside a block, and up to the end of one
NUM_BLOCKS, BLOCK_SIZE = 3072, 32


@pytest.fixture(scope="module")
def world(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    """16 adapters: every rank twice, on places that differ."""
    scratch = tmp_path_factory.mktemp("adapters")
    folders = {
        f"a{number}": make_lora(
            scratch / f"a{number}", tiny_base, seed=number, r=RANKS[number % 8], target_modules=PLACES[number % 6]
        )
        for number in range(16)
    }
    return World(load_tiny(tiny_base, NUM_BLOCKS, BLOCK_SIZE), folders)


@pytest.fixture(scope="session")
def families(biased_base: Path, artifact: Callable[[str, int], Path]) -> World:
    """`<family> A` and `<family> B` of every family."""
    names = [*FAMILIES, *FAMILIES_OF_BIASED]
    folders = {f"{name} {letter}": artifact(name, seed) for name in names for letter, seed in SEEDS.items()}
    return World(load_tiny(biased_base, NUM_BLOCKS, BLOCK_SIZE), folders)
