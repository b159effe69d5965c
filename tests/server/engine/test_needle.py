"""Every request among many others gets what it gets alone. The fake runner raises on any stale or crossed KV."""

import random
from dataclasses import replace

import pytest

from server.engine.messages import EngineConfig
from tests.server.engine.world import DIGEST_BYTES, World, digest_of, prompt_of, virtual_of


def random_world(draw: random.Random) -> World:
    """Limits at random: small pools preempt, few slots evict, small budgets chunk."""
    max_batch_tokens = draw.choice([4, 8, 16, 64])
    slots = draw.choice([2, 3, 6])
    world = World(
        num_blocks=draw.choice([10, 16, 40, 200]),
        block_size=draw.choice([1, 4, 8]),
        vocab_size=draw.choice([30, 512]),
        max_batch_tokens=max_batch_tokens,
        max_running=draw.randrange(1, min(max_batch_tokens, 16) + 1),
        slot_bytes=slots * DIGEST_BYTES,
        host_bytes=draw.choice([2, 4, 30]) * DIGEST_BYTES,
        copy_bytes_per_step=draw.choice([1, 1000]),
        is_prefix_cached=draw.random() < 0.6,
        has_prefixes=draw.random() < 0.7,
        num_loaders=draw.randrange(1, 4),
    )
    scheduler = world.engine.scheduler
    scheduler.limits = replace(scheduler.limits, max_scored_tokens=draw.choice([1, 5, 128]))
    return world


def ask(draw: random.Random, world: World) -> str:
    """A random request; many begin like an earlier one and use the same adapters, so that the prefix cache has work."""
    most, vocab = world.engine.max_sequence_tokens - 1, world.runner.vocab_size
    prompt = prompt_of(draw, draw.choice([1, 2, draw.randrange(1, 20), draw.randrange(1, 601)]), vocab)
    often = draw.randrange(1 + draw.randrange(12))  # low numbers are used more
    choices: list[list[int | tuple[int, float]]] = [[], [often], [often], [(often, 0.5)]]
    adapters = [*draw.choice(choices)]
    if draw.random() < 0.1:
        adapters = [(number, 0.5) for number in draw.sample(range(12), 2)]
    namespace = draw.choice(["t", "t", "t", "u"])
    if world.requests and draw.random() < 0.4:
        before = draw.choice([*world.requests.values()])
        adapters, namespace = (
            [(int(adapter.digest[:8]), adapter.weight) for adapter in before.adapters],
            before.namespace,
        )
        prompt = before.prompt[: draw.randrange(1, len(before.prompt) + 1)] + prompt[: draw.randrange(30)]
    num_virtual = sum(
        virtual_of(adapter if isinstance(adapter, int) else adapter[0]) for adapter in adapters if world.has_prefixes
    )
    is_scored = draw.random() < 0.3
    adapters, most = (adapters, most - num_virtual) if num_virtual < most else ([], most)
    return world.submit(
        prompt[:most],
        *adapters,
        namespace=namespace,
        timeout=draw.choice([1e9, 1e9, 1e9, draw.random()]),
        max_tokens=0 if is_scored and draw.random() < 0.5 else draw.randrange(1, 40),
        prompt_logprobs=draw.randrange(3) if is_scored else None,
        scored_from=draw.choice([1, draw.randrange(1, 40)]),
        temperature=draw.choice([0.0, 1.0]),
        seed=draw.randrange(3),
        ignore_eos=draw.random() < 0.5,
    )


@pytest.mark.parametrize("seed", range(300))
def test_needle(seed: int) -> None:
    """Every answer is the solo one under random arrivals, chunks, preemption, evictions, aborts and deadlines."""
    draw = random.Random(seed)
    world = random_world(draw)
    aborted: set[str] = set()
    for _ in range(draw.randrange(2, 33)):
        ask(draw, world)
        for _ in range(draw.choice([0, 0, 1, 5])):
            if world.spawner.jobs and draw.random() < 0.5:
                world.spawner.run_one()
            world.step()
        if draw.random() < 0.1:
            aborted.add(name := draw.choice([*world.requests]))
            world.engine.abort(name)
        if draw.random() < 0.1:
            world.engine.discard(digest_of(draw.randrange(12)))
    world.run()
    for name, answer in world.answers.items():
        is_gone = name in aborted and not answer.is_over
        is_late = answer.failure is not None and answer.failure.code == "deadline_exceeded"
        assert is_gone or is_late or world.is_right(name), (name, answer)
        assert answer.tokens == world.alone(name)[0][: len(answer.tokens)]
        assert answer.scores == world.scores_alone(name)[: len(answer.scores)]
    world.assert_at_rest()


def test_needle_meets_what_it_is_for() -> None:
    """Together those trials preempt, hit the cache, evict, end late and abort: they are not idle."""
    totals = dict.fromkeys(("preemptions_total", "cache_hit_tokens_total", "evictions_total"), 0)
    for seed in range(0, 60, 3):
        draw = random.Random(seed)
        world = random_world(draw)
        for _ in range(20):
            ask(draw, world)
        world.run()
        for name in totals:
            totals[name] += getattr(world.engine.stats(), name)
    assert all(count > 20 for count in totals.values()), totals


def test_more_adapters_than_slots_and_nobody_starves() -> None:
    """4x more adapters than the budget, 500 requests that keep coming: all are answered right, none waits long."""
    draw = random.Random(0)
    world = World(num_blocks=400, slot_bytes=8 * DIGEST_BYTES, host_bytes=16 * DIGEST_BYTES)
    worst = 0
    ages: dict[str, int] = {}
    while len(world.requests) < 500 or world.engine.has_work:
        while len(world.requests) < 500 and len(world.engine.sequences) < 24:
            zipf = min(31, int(draw.paretovariate(0.6)) - 1)
            ages[world.submit(prompt_of(draw, 12), zipf, max_tokens=8, ignore_eos=True)] = 0
        world.spawner.run_all()
        world.step()
        for name in world.engine.sequences:
            ages[name] += 1
            worst = max(worst, ages[name])
    assert all(world.is_right(name) for name in world.requests)
    assert world.engine.stats().evictions_total > 30
    assert worst < 400, worst
    world.assert_at_rest()


def test_stream_of_slotted_adapters_does_not_starve_a_skipped_one() -> None:
    """A third adapter that lacks only a slot gets its turn though two slots' adapters are asked for without end."""
    world = World(num_blocks=400, slot_bytes=2 * DIGEST_BYTES, max_running=4)
    for number in (0, 1, 0, 1):
        world.submit([9, 9], number, max_tokens=6 + number, ignore_eos=True)
    third = world.submit([8, 8], 2, max_tokens=2)
    for asked in range(2000):
        if world.answers[third].is_over:
            break
        world.spawner.run_all()
        world.step()
        for _ in range(6 - len(world.engine.sequences)):
            world.submit([9, asked], asked % 2, max_tokens=6, ignore_eos=True)
    assert world.is_right(third)
    assert asked < 300


def test_config_of_the_tests_is_a_real_one() -> None:
    """The small world is configured by the very message that the process reads."""
    assert isinstance(World().config, EngineConfig)
