"""Forms: every finished answer fits its form, of the base and of adapters, and is the same alone and in company."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema_rs
import pytest

from server.core import FormSpec, Sampling
from server.engine.grammar import grammar_of
from tests.kit.schemas import schema_of
from tests.kit.tiny import EOS
from tests.laws.world import Asked, World

NUM_SCHEMAS = 36
WORN: list[tuple[tuple[str, float], ...]] = [(), (("a0", 1.0),), (("a3", 1.0), ("a5", 0.5))]


def sampling_of(random_: random.Random) -> Sampling:
    """Greedy or drawn, with cuts, penalties, a bias or none of them."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 1.0},
        {"temperature": 5.0, "top_k": 5, "top_p": 0.9},
        {"temperature": 0.7, "min_p": 0.2, "frequency_penalty": 1.0},
        {"repetition_penalty": 1.3, "logit_bias": {34: -5.0, 125: 3.0}},
    ]
    return Sampling(max_tokens=400, seed=random_.randrange(2**32), **random_.choice(settings))


@pytest.fixture(scope="module")
def asked() -> list[tuple[dict[str, Any], Asked]]:
    """Schemas, each with a request of the base or of adapters."""
    random_ = random.Random(7)
    return [
        (
            schema := schema_of(random_),
            Asked(
                random_.choice(WORN),
                tuple(random_.randrange(256) for _ in range(random_.randrange(1, 60))),
                sampling_of(random_),
                arrives=random_.randrange(20),
                form=grammar_of(FormSpec("json_schema", schema, "f")),
            ),
        )
        for _ in range(NUM_SCHEMAS)
    ]


def test_every_finished_answer_fits(world: World, asked: list[tuple[dict[str, Any], Asked]]) -> None:
    """All kinds of rows in one batch, with and without forms: what ends by itself is valid, and the same alone."""
    free = [Asked((("a1", 1.0),), (1, 2, 3 + number), Sampling(max_tokens=20), arrives=number) for number in range(4)]
    with world.engine(max_running=12, max_batch_tokens=64) as engine:
        answers = world.answer(engine, [*(one for _, one in asked), *free])
    ended = 0
    for (schema, one), tokens in zip(asked, answers, strict=False):
        if tokens[-1] == EOS:
            ended += 1
            assert jsonschema_rs.is_valid(schema, json.loads(bytes(tokens[:-1]))), (schema, bytes(tokens[:-1]))
        else:
            assert len(tokens) == one.sampling.max_tokens, (schema, bytes(tokens))
    assert ended > 0.9 * len(asked)
    for one, tokens in [(asked[number][1], answers[number]) for number in range(0, len(asked), 6)]:
        assert world.solo(one) == tokens
    assert [world.solo(one) for one in free] == answers[-4:]


def test_what_must_follow_is_the_same(
    world: World, asked: list[tuple[dict[str, Any], Asked]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers in which forced tokens are taken without a step each are those in which every token has one.

    The model computes the same whether a prompt's chunk has such tokens or each has a step: what is drawn after them,
    and its log-probability, are the same bits.
    """
    some = [one for _, one in asked[:12]]
    with world.engine(max_running=12, max_batch_tokens=64) as engine:
        fast = world.answer(engine, some)
        num_fast = engine.stats().fast_forward_tokens_total
    monkeypatch.setattr("server.engine.engine.MAX_FAST_FORWARD", 0)
    with world.engine(max_running=12, max_batch_tokens=64) as engine:
        assert fast == world.answer(engine, some)
        assert num_fast > 0.2 * sum(map(len, fast)) and not engine.stats().fast_forward_tokens_total


@pytest.mark.parametrize(
    ("kind", "value", "pattern"),
    [
        ("regex", "[a-c]{2,5}-[0-9]+", "[a-c]{2,5}-[0-9]+"),
        ("choice", ["yes", "no", "yes, please"], "yes|no|yes, please"),
        ("grammar", 'start: "a" (start | "b")', "a+b"),
    ],
)
def test_text_forms(world: World, kind: Any, value: Any, pattern: str) -> None:
    """An answer matches its expression, is one of its texts, or is what its grammar makes, with any adapters."""
    form = grammar_of(FormSpec(kind, value, "f"))
    requests = [
        Asked(worn, (5, 6, 7 + seed), Sampling(temperature=2.0, seed=seed, max_tokens=60), form=form)
        for worn in WORN
        for seed in range(3)
    ]
    with world.engine() as engine:
        answers = world.answer(engine, requests)
    texts = [bytes(tokens[:-1]).decode() for tokens in answers if tokens[-1] == EOS]
    assert len(set(texts)) > 1 and all(re.fullmatch(pattern, text) for text in texts), texts


def test_logprobs_are_the_models_own(world: World) -> None:
    """A token that a form forces has the log-probability that the model gives it, not 0."""
    form = grammar_of(FormSpec("choice", ["{"], "f"))
    with world.engine() as engine:
        engine.submit(world._submit("r", Asked((), (1, 2), Sampling(logprobs=1), form=form)))
        outputs = []
        while engine.has_work:
            done = engine.step()
            outputs += done.outputs if done else []
    first = outputs[0]
    assert first.token_ids == [ord("{")] and first.logprobs[0].chosen < -1
    assert first.logprobs[0].top[0][0] != ord("{")
