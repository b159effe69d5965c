"""What raises for one sequence of a step ends it alone: every place is tried, over the real model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from server.core import AdapterRef, Row, RunnerConfig, Sampling
from server.engine.engine import Engine
from server.engine.messages import Submit
from server.model.runner import load
from tests.kit.poison import Poison, armed, is_for, name_of, watched_places
from tests.laws.world import World

MARK = 201  # the first token of the poisoned prompt, and of no other
FAMILIES = (
    "lora",
    "ia3",
    "prefix-tuning",
    "prompt-tuning",
    "bottleneck-houlsby",
    "bitfit",
    "trainable-tokens",
    "selective-layer",
)
EVERY_OPTION: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "logit_bias": {7: 1.0},
    "logprobs": 2,
}
OPTIONS = (EVERY_OPTION, {"temperature": 0.9}, {"temperature": 0.9, "top_p": 0.99}, {"logprobs": 0})


class Steps:
    """An engine whose calls arm a poison each."""

    def __init__(self, world: World, engine: Engine[Any], poison: Poison | None) -> None:
        self.world, self.engine, self.poison = world, engine, poison
        self.tokens: dict[str, list[int]] = {}
        self.failures: dict[str, str] = {}

    def submit(self, name: str, family: str | None, prompt: list[int], **sampling: Any) -> None:
        """Queue a sequence."""
        adapters: tuple[AdapterRef, ...] = ()
        if family is not None:
            patch = self.world.patch(family)
            adapters = (AdapterRef(patch.digest, 1.0, patch.num_virtual),)
        self.tokens[name] = []
        self.arm()
        chosen = Sampling(**{"max_tokens": 2, "ignore_eos": True, "seed": 5, **sampling})
        self.engine.submit(Submit(name, name, prompt, chosen, time.monotonic() + 60, time.monotonic(), adapters))

    def run(self) -> None:
        """Step until nothing is left; the engine's bookkeeping is checked after each."""
        while self.engine.has_work:
            self.arm()
            done = self.engine.step()
            self.engine.assert_consistent()
            for output in done.outputs if done else ():
                self.tokens[output.sequence_id] += output.token_ids
                if output.failure is not None:
                    self.failures[output.sequence_id] = output.failure.code

    def arm(self) -> None:
        """Let the poison act from now on."""
        if self.poison is not None:
            self.poison.arm()


@pytest.fixture(scope="module")
def world(biased_base: Path, artifact: Callable[[str, int], Path]) -> World:
    """A tiny qwen2, and an artifact of each family."""
    config = RunnerConfig(
        folder=str(biased_base), name="tiny", precision="fp32", num_threads=1, kv_cache_bytes=2**18, block_size=4
    )
    return World(load(config), {family: artifact(family, 0) for family in FAMILIES})


def ask(steps: Steps, family: str | None, options: dict[str, Any]) -> None:
    """Two neighbours and the poisoned sequence, in the same steps."""
    steps.submit("greedy", None, [1, 2, 3, 4, 5])
    steps.submit("bad", family, [MARK, 2, 3, 4, 5], **options)
    steps.submit("drawn", "lora", [6, 7, 8, 9, 10, 11], temperature=0.9, top_p=0.8)
    steps.run()


# What keeps account of all sequences: half done it is wrong for all, and the engine starts anew with what was asked.
ACCOUNTS = ("Engine.submit", "Engine._schedule", "Engine._fail", "Engine._finish")
GUARDS = ("Engine._prepared", "Engine._run_rows", "Engine._run_alone")  # all that they do is to catch
IS_BAD = is_for(MARK, ACCOUNTS)
CASES: list[tuple[str | None, dict[str, Any]]] = [
    *((None, options) for options in OPTIONS),
    *((family, {}) for family in FAMILIES),
]


def test_every_place(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every function that computes or keeps something for a sequence raises for one: it alone fails, with `internal`.

    Its neighbours get what they get alone, nothing is held at the end, and the engine goes on.
    """
    monkeypatch.setattr(logging.root.manager, "disable", logging.CRITICAL)  # hundreds of tracebacks
    tried: set[str] = set()
    for case in CASES:
        with world.engine(max_running=4, max_waiting=16) as engine, watched_places(IS_BAD, "server") as places:
            healthy = Steps(world, engine, None)
            ask(healthy, *case)
        for place in places:
            if name_of(place) not in tried and place.co_qualname not in GUARDS:
                tried.add(name_of(place))
                with world.engine(max_running=4, max_waiting=16) as engine, monkeypatch.context() as patch:
                    check(Steps(world, engine, Poison(place, IS_BAD)), case, healthy.tokens, patch)
    assert len(tried) > 60


def check(
    steps: Steps, case: tuple[str | None, dict[str, Any]], right: dict[str, list[int]], patch: pytest.MonkeyPatch
) -> None:
    assert steps.poison is not None
    run_alone, what = steps.engine._run_alone, name_of(steps.poison.place)

    def armed_again(row: Row) -> Any:
        steps.arm()
        return run_alone(row)

    patch.setattr(steps.engine, "_run_alone", armed_again)
    with armed(steps.poison):
        ask(steps, *case)
    for neighbour in ("greedy", "drawn"):
        assert steps.tokens[neighbour] == right[neighbour], what
    if steps.failures:
        assert steps.failures == {"bad": "internal"}, what
    else:  # what is kept once it was found is not called again
        assert steps.tokens["bad"] == right["bad"], what
    stats = steps.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks_used, stats.num_pins) == (0, 0, 0, 0), what
