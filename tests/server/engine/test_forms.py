"""Forms in the engine: compiled beside the steps, kept over preemption, rebuilt when an answer is resumed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from llguidance import LLTokenizer

from server.core import FormSpec
from server.engine.forms import FormCompiler
from server.engine.grammar import grammar_of
from server.engine.sequence import Sequence
from tests.server.engine.spawners import LateSpawner
from tests.server.engine.world import EOS, World, prompt_of

END = 261  # the end token of the tokenizer of single bytes
SCHEMA = {
    "type": "object",
    "properties": {"a": {"enum": [1, "two", None]}, "b": {"type": "boolean"}},
    "required": ["b"],
}
CLOSED = grammar_of(FormSpec("json_schema", {**SCHEMA, "additionalProperties": False}, "f"))


def make_world(num_blocks: int = 64, **limits: Any) -> tuple[World, LateSpawner]:
    """A world whose forms are compiled when the test says so."""
    compiler = LateSpawner()
    forms: FormCompiler[Sequence] = FormCompiler(LLTokenizer("byte"), compiler, lambda: None)
    return World(forms=forms, vocab_size=262, num_blocks=num_blocks, **limits), compiler


def finish(world: World, compiler: LateSpawner) -> None:
    """Compile what is asked for and step until nothing is left."""
    while world.engine.has_work:
        compiler.run_all()
        world.spawner.run_all()
        world.step()


def ask(world: World, seed: int, answered: list[int] | None = None, form: str = CLOSED, **fields: Any) -> str:
    """Submit a request in a form that ends at the tokenizer's own end token."""
    prompt = prompt_of(random.Random(seed), 6, 256)
    asked: dict[str, Any] = {"temperature": 1.0, "seed": seed, "max_tokens": 80, "stop_token_ids": (END,)} | fields
    return world.submit(prompt, 0, form=form, answered=answered, **asked)


def test_a_form_that_is_compiled_holds_nobody_up() -> None:
    """A sequence waits for its form; meanwhile others are admitted, and it may be aborted."""
    world, compiler = make_world()
    waits, gone = ask(world, 1), ask(world, 2)
    other = world.submit([9, 9], max_tokens=5)
    while not world.answers[other].is_over:
        world.step()
    assert not world.answers[waits].tokens and len(compiler.jobs) == 2
    world.engine.abort(gone)
    finish(world, compiler)
    assert world.answers[waits].finish_reason == "stop" and not world.answers[gone].tokens
    assert not world.engine.sequences


def test_preempted_answers_keep_their_form() -> None:
    """Answers that run out of blocks are preempted, go on, and are those that they are with room."""
    texts = []
    for num_blocks in (64, 12):
        world, compiler = make_world(num_blocks=num_blocks)
        names = [ask(world, seed) for seed in range(6)]
        finish(world, compiler)
        texts.append([world.answers[name].tokens for name in names])
        assert all(world.answers[name].finish_reason == "stop" for name in names)
        assert (world.engine.stats().preemptions_total > 0) == (num_blocks == 12)
    assert texts[0] == texts[1] and len({tuple(tokens) for tokens in texts[0]}) > 1


def test_a_resumed_answer_goes_on_in_its_form() -> None:
    """An answer that another engine began ends as it would have there."""
    world, compiler = make_world()
    name = ask(world, 3)
    finish(world, compiler)
    whole = world.answers[name].tokens
    for cut in range(1, len(whole)):
        world, compiler = make_world()
        name = ask(world, 3, answered=whole[:cut])
        finish(world, compiler)
        assert world.answers[name].tokens == whole[cut:]


def test_a_form_that_fails_ends_its_sequence_alone() -> None:
    """A form that does not compile, or that raises, fails its own sequence with a sentence; the neighbours go on."""
    world, compiler = make_world()
    bad, good = ask(world, 4, form="start: x"), ask(world, 5)
    unfit = ask(world, 6, answered=[ord("x")])
    finish(world, compiler)
    for name in (bad, unfit):
        failure = world.answers[name].failure
        assert failure is not None and failure.code == "unsupported_schema", failure
    assert world.answers[good].finish_reason == "stop"
    world.engine.assert_consistent()


def test_an_engine_without_forms_refuses_them() -> None:
    """An engine whose base has no tokenizer for forms answers no such request in free text."""
    world = World()
    name = world.submit([9], form=CLOSED)
    world.run()
    assert world.answers[name].failure is not None


FAST_FORWARD = "server.engine.engine.MAX_FAST_FORWARD"


def run_all(num_blocks: int, **limits: Any) -> tuple[list[Any], World]:
    """The answers to requests of every kind, with what each output says but when."""
    world, compiler = make_world(num_blocks, **limits)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"stop_token_ids": (ord("b"), END)},  # within what has to follow
        {"stop_token_ids": (END, 260)},  # any of two may end it
        {"logprobs": 2},
        {"prompt_logprobs": 1},
        *({"max_tokens": number} for number in range(1, 8)),
    ]
    names = [ask(world, seed, namespace="st"[seed % 2], **kind) for seed, kind in enumerate(kinds * 2)]
    names.append(world.submit([9, 9], 0, max_tokens=40))
    finish(world, compiler)
    world.engine.assert_consistent()
    answers = [world.answers[name] for name in names]
    told = [
        (one.tokens, one.finish_reason, one.scores, [each for output in one.outputs for each in output.logprobs])
        for one in answers
    ]
    assert all(sum(output.timing is not None for output in one.outputs) == 1 for one in answers)
    return told, world


@pytest.mark.parametrize(("num_blocks", "max_batch_tokens"), [(256, 8), (24, 64)])
def test_what_must_follow_needs_no_step(
    num_blocks: int, max_batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens that a form forces are the answer's, its logprobs' and its end's as if each were sampled in a step."""
    told, fast = run_all(num_blocks, max_batch_tokens=max_batch_tokens)
    monkeypatch.setattr(FAST_FORWARD, 0)
    slowly_told, slow = run_all(num_blocks, max_batch_tokens=max_batch_tokens)
    assert told == slowly_told
    assert (fast.engine.stats().preemptions_total > 0) == (num_blocks == 24)
    assert fast.engine.stats().fast_forward_tokens_total > 120 and not slow.engine.stats().fast_forward_tokens_total


def test_what_must_follow_comes_with_what_was_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are those of tokens that may differ; an answer without choice has an output every so many tokens."""
    world, compiler = make_world()
    form = grammar_of(FormSpec("choice", ["no choice at all"], "f"))
    name = ask(world, 1, form=form, stop_token_ids=())
    finish(world, compiler)
    outputs = [output.token_ids for output in world.answers[name].outputs]
    assert outputs[:2] == [[*b"no choice"], [*b" at all"]] and outputs[2:] in ([EOS], [[END]])  # it may be either
    assert len(world.runner.batches) == 3
    monkeypatch.setattr(FAST_FORWARD, 0)
    world, compiler = make_world()
    name = ask(world, 1, form=form, stop_token_ids=())
    finish(world, compiler)
    assert len(world.runner.batches) == 17


def test_a_step_has_a_token_for_each_that_decodes() -> None:
    """What has to follow in some answers takes none of a step's tokens that another answer needs."""
    world, compiler = make_world(max_batch_tokens=8, max_running=8)
    form = grammar_of(FormSpec("regex", "([ab]cdefghij)+", "f"))
    names = [ask(world, seed, form=form, max_tokens=40) for seed in range(7)]
    free = world.submit([9, 9], 0, max_tokens=30)
    compiler.run_all()
    world.spawner.run_all()
    while not all(world.answers[name].tokens for name in (*names, free)):
        compiler.run_all()
        world.spawner.run_all()
        world.step()
    while not world.answers[free].is_over:
        num_tokens = len(world.answers[free].tokens)
        world.step()
        assert len(world.answers[free].tokens) == num_tokens + 1
    finish(world, compiler)
