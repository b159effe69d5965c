"""Law 2, the needle: every family in one batch, in a crowded engine, and each request gets what it gets alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from adapters_store.primitives import PrefixEmbeds
from server.core import Sampling
from server.model.runner import Loaded
from tests.laws.conftest import BLOCK_SIZE
from tests.laws.world import Asked, World, load_tiny

NUM_REQUESTS = 32  # a world, so that each has 31 others; 9 worlds are 288 needles
WORLDS = [*((seed, "fp32") for seed in range(7)), (8, "fp16"), (10, "int8")]  # the last two share prefixes
SlotWeights = tuple[tuple[str, float], ...]


@pytest.fixture(scope="module")
def tight(biased_base: Path) -> Callable[..., Loaded]:
    """The base with few blocks, of weights in so many bits."""
    return cache(lambda num_blocks, precision="fp32": load_tiny(biased_base, num_blocks, BLOCK_SIZE, precision))


def random_hats(world: World, draw: random.Random) -> SlotWeights:
    """None, one of any family, or several with weights: up to two prefixes in an order that composes, and up to two
    others.
    """
    names = sorted(world.folders)
    kind = draw.random()
    if kind < 0.1:
        return ()
    if kind < 0.6:
        return ((draw.choice(names), 1.0),)
    weighed = [name for name in names if not world.patch(name).num_virtual]
    adapters = [(name, draw.choice([1.0, 0.5, 0.25, -0.2, 0.0])) for name in draw.sample(weighed, draw.randrange(1, 3))]
    prefixes = draw.sample([name for name in names if world.patch(name).num_virtual], draw.randrange(3))
    prefixes.sort(key=lambda name: isinstance(world.patch(name).prefix, PrefixEmbeds))  # keys and values come first
    return (*((name, 1.0) for name in prefixes), *adapters)


def random_request(world: World, draw: random.Random, earlier: list[Asked]) -> Asked:
    """Prompts of 1-600 tokens; some begin as an earlier one does, under its hats or others, for the prefix cache."""
    prompt = tuple(draw.randrange(256) for _ in range(draw.choice([draw.randrange(1, 30), draw.randrange(1, 601)])))
    adapters = random_hats(world, draw)
    if earlier and draw.random() < 0.4:
        like = draw.choice(earlier)
        prompt = (like.prompt[: draw.randrange(1, len(like.prompt) + 1)] + prompt)[:600]
        adapters = draw.choice([like.adapters, adapters])
    sampling = Sampling(
        max_tokens=draw.randrange(1, 24),
        temperature=draw.choice([0.0, 0.8]),
        top_p=draw.choice([1.0, 0.9]),
        seed=draw.randrange(1000),
        repetition_penalty=draw.choice([1.0, 1.2]),
    )
    arrives = (earlier[-1].arrives if earlier else 0) + draw.choice([0, 0, 1, 4])
    return Asked(adapters, prompt, sampling, arrives, tenant=draw.choice("tu"))


@pytest.mark.parametrize(("seed", "precision"), WORLDS)
def test_the_needle(seed: int, precision: str, families: World, tight: Callable[..., Loaded]) -> None:
    """All families under chunks, preemption, few slots, two tenants, the prefix cache on or off: 0 mismatches."""
    draw, asked = random.Random(seed), list[Asked]()
    world = families.on(tight(draw.choice([24, 32, 100]), precision))
    for _ in range(NUM_REQUESTS):
        asked.append(random_request(world, draw, asked))
    most = max(world.num_bytes(*{name for name, _ in one.adapters}) for one in asked)
    with world.engine(
        max_batch_tokens=draw.choice([17, 64, 512]),
        max_running=draw.randrange(2, 17),
        slot_bytes=most,
        host_bytes=2 * most,
        is_prefix_cached=seed % 2 == 0,
    ) as engine:
        together = world.answer(engine, asked)
    alone = [world.solo(one) for one in asked]
    wrong = [(one.adapters, got, want) for one, got, want in zip(asked, together, alone, strict=True) if got != want]
    assert not wrong, wrong


def test_preempted_and_evicted_answers_are_right(families: World, tight: Callable[..., Loaded]) -> None:
    """Where blocks and slots are so few that sequences are preempted and adapters evicted, nothing is mixed up."""
    draw, world = random.Random(0), families.on(tight(24))
    prompts = [tuple(draw.randrange(256) for _ in range(60)) for _ in range(3)]
    sampling = Sampling(max_tokens=48, ignore_eos=True)
    names = [*world.folders][::3]
    asked = [Asked(((name, 1.0),), draw.choice(prompts), sampling) for name in names]
    with world.engine(slot_bytes=2**17, max_running=8) as engine:
        together = world.answer(engine, asked)
        assert engine.stats().preemptions_total > 0
        assert engine.stats().evictions_total > 0
    assert together == [world.solo(one) for one in asked]
