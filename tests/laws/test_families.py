"""Law 1 over all families: never the base, another adapter or another version, however positions are shared."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from server.core import Sampling
from server.engine.engine import Engine
from server.model.runner import Loaded
from tests.kit.families import FAMILIES, FAMILIES_OF_BIASED
from tests.laws.conftest import BLOCK_SIZE, SEEDS
from tests.laws.world import Asked, World, load_tiny

NAMES = [*FAMILIES, *FAMILIES_OF_BIASED]
NEXT = {name: NAMES[(at + 1) % len(NAMES)] for at, name in enumerate(NAMES)}
PROMPT = tuple(random.Random(0).randrange(3, 250) for _ in range(80))  # two whole blocks, which could be shared
NUM_ANSWER = 12
SEEDED = Sampling(max_tokens=NUM_ANSWER, temperature=1.0, seed=1, ignore_eos=True)  # greedy ones soon repeat themselves
NUM_COMPUTED = len(PROMPT) + NUM_ANSWER - 1  # of a request whose prefix is there: the last token has no KV
NUM_FEW = 8  # blocks


def ask(*names: str, tenant: str = "law") -> Asked:
    return Asked(tuple((name, 1.0) for name in names), PROMPT, SEEDED, tenant=tenant)


def prefixed(world: World) -> list[str]:
    """The adapters that have virtual positions."""
    return [name for name in world.folders if world.patch(name).num_virtual]


@pytest.fixture(scope="module")
def few_blocks(biased_base: Path) -> Loaded:
    return load_tiny(biased_base, NUM_FEW, BLOCK_SIZE)


@pytest.mark.parametrize("follower", [lambda family: family, NEXT.get], ids=["itself", "next"])
@pytest.mark.parametrize("family", NAMES)
def test_one_after_another(family: str, follower: Callable[[str], str], families: World) -> None:
    """[none, A, B, none] with the same prompt, B of the same family or of the next one, in the slot that A had."""
    first, second = f"{family} A", f"{follower(family)} B"
    order = [ask(), ask(first), ask(second), ask()]
    wanted = [families.solo(one) for one in order]
    assert len(set(map(tuple, wanted))) == 3, "what is to be told apart answers alike"
    most = max(families.num_bytes(first), families.num_bytes(second))
    with families.engine(slot_bytes=most, host_bytes=most) as engine:
        assert [families.answer(engine, [one])[0] for one in order] == wanted
        assert engine.stats().evictions_total >= 1
        assert engine.stats().cache_hit_tokens_total > 0  # the last one shared with the first


@pytest.mark.parametrize("family", NAMES)
def test_a_name_of_new_bytes(family: str, families: World) -> None:
    """A name that was given other weights answers by these; its old bytes under another name as they did."""
    world = replace(families, folders={"name": families.folders[f"{family} A"]})
    old, new = (families.solo(ask(f"{family} {letter}")) for letter in "AB")
    with world.engine() as engine:
        assert world.answer(engine, [ask("name")]) == [old]
        world.folders |= {"name": families.folders[f"{family} B"], "before": families.folders[f"{family} A"]}
        assert world.answer(engine, [ask("name"), ask("before")]) == [new, old]


def num_computed(engine: Engine[Any], world: World, *asked: Asked) -> int:
    """How many tokens the engine computes for these, which all must be answered as they were alone."""
    before = engine.stats().tokens_total
    assert world.answer(engine, list(asked)) == [world.solos[world.key(one)] for one in asked]
    return engine.stats().tokens_total - before


def test_equal_bytes_share_virtual_positions(families: World, tmp_path: Path) -> None:
    """Two tasks of equal bytes, of two tenants: what comes from virtual positions is computed once, prompts never."""
    for name in prefixed(families):
        num_virtual, copy = families.patch(name).num_virtual, f"{name} again"
        world = replace(families, folders={**families.folders, copy: tmp_path / copy})
        shutil.copytree(families.folders[name], tmp_path / copy)
        both = [ask(name, tenant="t"), ask(copy, tenant="u")]
        world.solo(both[0])
        with world.engine() as engine:
            assert num_computed(engine, world, *both) == num_virtual + 2 * NUM_COMPUTED, "at once"
            assert num_computed(engine, world, ask(copy, tenant="v")) == NUM_COMPUTED, "later"
            assert num_computed(engine, world, ask(copy, tenant="t")) < NUM_COMPUTED - BLOCK_SIZE, "the same tenant"


@pytest.mark.parametrize("family", NAMES)
def test_a_hat_takes_the_bytes_of_its_numbers(family: str, families: World) -> None:
    """At both levels the budgets count what a hat is made of: in fp32 four bytes for each of its numbers and ids."""
    for name in (f"{family} {letter}" for letter in SEEDS):
        wanted = 4 * families.patch(name).num_items
        assert families.num_bytes(name) == wanted
        with families.engine() as engine:
            families.answer(engine, [ask(name)])
            assert (engine.stats().host_bytes_used, engine.stats().slot_bytes_used) == (wanted, wanted)


def test_an_evicted_prefix_is_computed_again(families: World, few_blocks: Loaded) -> None:
    """A prefix whose blocks were taken by others is computed anew, and the answer is the same."""
    world = families.on(few_blocks)
    longest = Asked((), (65,) * (NUM_FEW * BLOCK_SIZE - NUM_ANSWER), SEEDED)
    world.solo(longest)
    for name in prefixed(world):
        num_virtual = world.patch(name).num_virtual
        world.solo(ask(name))
        with world.engine() as engine:
            assert num_computed(engine, world, ask(name)) == num_virtual + NUM_COMPUTED
            assert num_computed(engine, world, ask(name)) < NUM_COMPUTED
            num_computed(engine, world, longest)
            assert num_computed(engine, world, ask(name)) == num_virtual + NUM_COMPUTED


def test_all_at_once(families: World) -> None:
    """The same prompt in one batch of the base and every adapter of every family, and pairs of prefixes in order."""
    prefixes = prefixed(families)
    asked = [ask(), *map(ask, families.folders), ask(prefixes[0], prefixes[2]), ask(prefixes[2], prefixes[0])]
    wanted = [families.solo(one) for one in asked]
    assert len(set(map(tuple, wanted))) == len(asked), "what is to be told apart answers alike"
    with families.engine(max_running=len(asked), max_batch_tokens=1024) as engine:
        assert families.answer(engine, asked) == wanted
