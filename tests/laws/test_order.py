"""Law 1: never the base, another version or another tenant, also where slots, names and KV are used again."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

from server.core import Sampling
from tests.laws.world import Asked, World

PROMPT = tuple(random.Random(0).randrange(3, 250) for _ in range(80))  # two whole blocks, which could be shared
GREEDY = Sampling(max_tokens=12, ignore_eos=True)
KINDS: dict[str, tuple[tuple[str, float], ...]] = {
    "none": (),
    "A": (("a2", 1.0),),
    "B": (("a8", 1.0),),
    "half A": (("a2", 0.5),),
    "A and B": (("a2", 1.0), ("a8", 1.0)),
    "B and A": (("a8", 1.0), ("a2", 1.0)),
}


def ask(kind: str) -> Asked:
    return Asked(KINDS[kind], PROMPT, GREEDY)


def test_the_kinds_answer_differently(world: World) -> None:
    """What the other tests tell apart is apart: the adapters, their weights and the base give different answers."""
    answers = {kind: tuple(world.solo(ask(kind))) for kind in KINDS if kind != "B and A"}
    assert len(set(answers.values())) == len(answers)


def test_one_after_another_in_any_order(world: World) -> None:
    """[none, A, B, none] and every other order of the same prompt: nobody is answered from another's KV."""
    for order in itertools.permutations(["none", "A", "B", "half A"], 3):
        wanted = {kind: world.solo(ask(kind)) for kind in order}
        with world.engine() as engine:
            for kind in (*order, order[0]):
                assert world.answer(engine, [ask(kind)]) == [wanted[kind]], (order, kind)
            assert engine.stats().cache_hit_tokens_total > 0  # the last one shared with the first


def test_all_at_once(world: World) -> None:
    """The same prompt in one batch with every kind of hats, three times each."""
    asked = [ask(kind) for kind in [*KINDS] * 3]
    wanted = [world.solo(one) for one in asked]
    with world.engine() as engine:
        assert world.answer(engine, asked) == wanted


def test_a_slot_that_is_used_again(world: World) -> None:
    """With room for one adapter, each of many takes the slot of the one before, and none answers for another."""
    names = sorted(world.folders, key=lambda name: random.Random(name).random())
    largest = max(map(world.num_bytes, names))
    asked = [Asked(((name, 1.0),), PROMPT, GREEDY) for name in names]
    wanted = [world.solo(one) for one in asked]
    with world.engine(slot_bytes=largest, host_bytes=2 * largest) as engine:
        for one, want in zip([*asked, *asked], [*wanted, *wanted], strict=True):
            assert world.answer(engine, [one]) == [want]
        assert engine.stats().evictions_total >= len(names)


def test_two_names_of_equal_bytes_and_one_name_of_new_bytes(world: World, tmp_path: Path) -> None:
    """Identity is content: a copy under another name answers alike, and a name's new content answers anew."""
    shutil.copytree(world.folders["a2"], tmp_path / "copy")
    world.folders["copy"] = tmp_path / "copy"
    try:
        copied = Asked((("copy", 1.0),), PROMPT, GREEDY)
        with world.engine() as engine:
            together = world.answer(engine, [ask("A"), copied, ask("B"), ask("none")])
        assert together[0] == together[1] == world.solo(ask("A"))
        assert together[2:] == [world.solo(ask("B")), world.solo(ask("none"))]
    finally:
        del world.folders["copy"]


def test_four_times_as_many_adapters_as_fit(world: World) -> None:
    """500 requests over adapters that need four times the slots' bytes are all answered rightly; nobody starves."""
    sizes = {name: world.num_bytes(name) for name in world.folders}
    chance = random.Random(1)
    prompts = [tuple(chance.randrange(3, 250) for _ in range(n)) for n in (3, 40)]
    asked = [
        Asked(((chance.choice(list(sizes)), 1.0),), chance.choice(prompts), Sampling(max_tokens=4), index // 4)
        for index in range(500)
    ]
    wanted = [world.solo(one) for one in asked]
    quarter = max(sum(sizes.values()) // 4, *sizes.values())
    with world.engine(slot_bytes=quarter, host_bytes=2 * quarter) as engine:
        answers = world.answer(engine, asked)
        assert engine.stats().evictions_total > len(sizes)
    assert answers == wanted
