"""Probes of uploads: a few tokens of a step, over bytes that are not in the store yet."""

from __future__ import annotations

import random

from server.core import AdapterRef, Sampling
from server.engine.messages import Submit
from server.engine.scheduler import StepLimits
from tests.server.engine.world import RequestAnswer, World, digest_of, prompt_of

MOST = StepLimits(max_batch_tokens=8, max_running=1, max_waiting=1).max_probe_tokens


def probe(world: World, name: str, prompt: list[int], forced: tuple[int, ...] = ()) -> None:
    """Ask as the door does."""
    sampling = Sampling(max_tokens=max(1, len(forced)), forced=forced, logprobs=1, ignore_eos=True)
    adapters = (AdapterRef(digest_of(0)),)
    submit = Submit(name, "_probe", prompt, sampling, 1e9, world.clock.now, adapters, is_probe=True)
    world.requests[name], world.answers[name] = submit, RequestAnswer()
    world.engine.submit(submit)


def test_probes_take_little_of_a_step_that_others_are_in() -> None:
    """Probes together have at most 8 tokens a step while a sequence decodes, and yet end; it misses no step."""
    world = World(max_batch_tokens=64, num_blocks=256)
    draw = random.Random(1)
    stream = world.submit(prompt_of(draw, 4), max_tokens=60, ignore_eos=True)
    world.step()
    for number in range(3):
        probe(world, f"p{number}", prompt_of(draw, 20), (9, 10, 11))
    world.spawner.run_all()
    tokens = []
    while any(not world.answers[f"p{number}"].is_over for number in range(3)):
        before = world.engine.stats().tokens_total, len(world.answers[stream].tokens)
        world.spawner.run_all()
        world.step()
        tokens.append(world.engine.stats().tokens_total - before[0] - 1)
        assert len(world.answers[stream].tokens) == before[1] + 1
    assert max(tokens) == MOST and sum(tokens) == 3 * (20 + 2)
    world.run()
    assert world.is_right(stream)
    world.assert_at_rest()


def test_probes_alone_take_the_whole_step() -> None:
    """Probes are as quick as anything if nothing else runs."""
    world = World(max_batch_tokens=64, num_blocks=256)
    for number in range(3):
        probe(world, f"p{number}", prompt_of(random.Random(number), 20))
    world.step()
    world.spawner.run_all()
    before = world.engine.stats().tokens_total
    world.step()
    assert world.engine.stats().tokens_total - before == 60


def test_a_forced_answer_is_taken_and_scored() -> None:
    """The given tokens are the answer, each with its log-probability, whatever the model would say."""
    world = World()
    probe(world, "p", [11, 12, 13], (99, 7, 98))
    world.run()
    answer = world.answers["p"]
    assert (answer.tokens, answer.finish_reason) == ([99, 7, 98], "length")
    assert all(len(output.logprobs) == 1 for output in answer.outputs)


def test_what_is_staged_is_loaded_from_there_until_it_is_not() -> None:
    """The loader is told the folder; what failed before is tried again at once, and afterwards the store counts."""
    staged: dict[str, str] = {}
    world = World()
    world.engine._staged = staged
    world.loader.errors[digest_of(0)] = ValueError("not there yet")
    first = world.submit([11, 12], 0)
    world.run()
    assert world.answers[first].failure is not None
    del world.loader.errors[digest_of(0)]
    world.engine.stage(digest_of(0), "/staging/x")
    assert staged == {digest_of(0): "/staging/x"}
    second = world.submit([11, 12], 0)
    world.run()
    assert world.is_right(second)
    world.engine.stage(digest_of(0), None)
    assert staged == {}


def test_probes_are_nobody() -> None:
    """A probe makes no second tenant of a server with one: its prompts still take whole steps, and nobody gives way."""
    world = World(max_batch_tokens=64, max_running=2, num_blocks=256)
    draw = random.Random(1)
    for _ in range(2):
        world.submit(prompt_of(draw, 4), max_tokens=40, ignore_eos=True)
    world.step()
    probe(world, "p", prompt_of(draw, 20))
    for _ in range(10):
        world.spawner.run_all()
        world.step()
    assert world.engine.stats().preemptions_total == 0 and not world.answers["p"].is_over
    world.run()
    assert world.answers["p"].finish_reason == "length"
    last = world.submit(prompt_of(draw, 60), max_tokens=1)
    before = world.engine.stats().tokens_total
    world.step()
    assert world.engine.stats().tokens_total - before == 60 and world.answers[last].is_over
