"""Leaks: a sequence gives back all that it held, in every way in which it can end."""

from collections.abc import Callable

import pytest

from tests.server.engine.test_engine import PROMPT
from tests.server.engine.world import World, digest_of


def finish(world: World) -> None:
    world.submit(PROMPT, 1, max_tokens=5)


def stop(world: World) -> None:
    world.submit(PROMPT, 1, max_tokens=1000)


def late(world: World) -> None:
    world.submit(PROMPT, 1, max_tokens=1000, timeout=0.05, ignore_eos=True)


def abort_waiting(world: World) -> None:
    world.engine.abort(world.submit(PROMPT, 1))


def abort_running(world: World) -> None:
    name = world.submit(PROMPT, 1, max_tokens=1000, ignore_eos=True)
    while not world.answers[name].tokens:
        world.spawner.run_all()
        world.step()
    world.engine.abort(name)


def nonfinite(world: World) -> None:
    world.runner.nonfinite_on = {digest_of(3)}
    world.submit(PROMPT, 3)


def raising(world: World) -> None:
    world.runner.raises_on = {499}
    world.submit([10, 499], 1)


def failing_load(world: World) -> None:
    world.loader.errors[digest_of(4)] = ValueError("bad")
    world.submit(PROMPT, 4)


def preempted(world: World) -> None:
    for at in range(5):
        world.submit([*PROMPT, at], at % 2, max_tokens=40, ignore_eos=True)


def overloaded(world: World) -> None:
    for _ in range(12):
        world.submit(PROMPT, 1, max_tokens=2)


def discarded(world: World) -> None:
    world.submit(PROMPT, 1, max_tokens=2)
    world.engine.discard(digest_of(1))


WAYS_OUT: list[Callable[[World], None]] = [finish, stop, late, abort_waiting, abort_running, nonfinite, raising]
WAYS_OUT += [failing_load, preempted, overloaded, discarded]


@pytest.mark.parametrize("way_out", WAYS_OUT)
def test_everything_returns_after_every_way_out(way_out: Callable[[World], None]) -> None:
    """Pins, blocks and slots are as before after each terminal path, 20 times."""
    world = World(num_blocks=16, max_waiting=10, vocab_size=499)
    world.submit(PROMPT, 2, max_tokens=2)
    world.run()
    for _ in range(20):
        way_out(world)
        world.run()
        world.assert_at_rest()
        assert sorted(world.adapter_slots.slots) == list(range(len(world.adapter_slots.slots)))
        world.clock.now += 100


def test_forgotten_adapter_leaves_when_unused() -> None:
    """A deleted artifact serves those who began with it and is then neither in host memory nor in a slot."""
    world = World()
    name = world.submit(PROMPT, 1, max_tokens=20, ignore_eos=True)
    world.spawner.run_all()
    world.step()
    world.spawner.run_all()
    world.step()
    world.engine.discard(digest_of(1))
    assert world.engine.adapters.states() == {digest_of(1): "slot"}
    world.run()
    assert world.is_right(name)
    assert world.engine.adapters.states() == {}
    assert world.adapter_slots.slots == {}
