"""A tiny base in fp32 with adapters of many ranks and placements."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.model.runner import RunnerConfig, load
from tests.kit.adapters import make_lora
from tests.laws.world import World

ATTENTION, MLP = ["q_proj", "k_proj", "v_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]
PLACES = [ATTENTION, MLP, [*ATTENTION, *MLP], ["q_proj"], ["down_proj"], ["v_proj", "o_proj"]]
RANKS = (1, 2, 3, 4, 7, 8, 16, 33)


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
    config = RunnerConfig(
        folder=str(tiny_base), name="tiny", precision="fp32", num_threads=1, kv_cache_bytes=48 * 2**20
    )
    return World(load(config), folders)
