import random
from typing import Any

import pytest

from server.core import EngineFailure, Sampled
from server.engine.engine import Engine
from server.engine.in_flight import Request
from server.engine.sequence import Sequence
from server.model.fake import FakePacked, FakeRunner
from tests.server.engine.world import DIGEST_BYTES, EOS, World, digest_of, prompt_of

PROMPT = [10, 11, 12, 13, 14]
POISON = "499"  # a token, as it is written


def code(world: World, name: str) -> str | None:
    failure = world.answers[name].failure
    return None if failure is None else failure.code


def test_base_and_adapters_share_a_step() -> None:
    """Rows with no adapter, one and two run in one forward pass, each as it would alone."""
    world = World(max_batch_tokens=64)
    names = [
        world.submit(PROMPT, *adapters, max_tokens=9, ignore_eos=True)
        for adapters in ((), (1,), (2,), ((1, 0.5), (2, 0.5)))
    ]
    world.spawner.run_all()
    world.run()
    assert max(world.runner.batches) == 4
    assert all(world.is_right(name) for name in names)
    assert len({tuple(world.answers[name].tokens) for name in names}) == 4


def test_adapters_take_turns_in_slots() -> None:
    """Sequences of no adapter, A, B, none, and B alone in A's old slot never get another adapter's answer."""
    world = World(slot_bytes=DIGEST_BYTES)
    for adapters in ((), (1,), (2,), (), (1,)):
        name = world.submit(PROMPT, *adapters, max_tokens=5)
        world.run()
        assert world.is_right(name)


def test_eos_ends_with_stop_and_is_shown() -> None:
    """The end-of-sequence token ends a sequence, is its last token, and with ignore_eos is one like any other."""
    world = World(vocab_size=10)
    stopped = world.submit(PROMPT, max_tokens=500)
    going_on = world.submit(PROMPT, max_tokens=60, ignore_eos=True)
    world.run()
    assert world.answers[stopped].finish_reason == "stop"
    assert world.answers[stopped].tokens[-1] in EOS
    assert set(EOS).isdisjoint(world.answers[stopped].tokens[:-1])
    assert world.answers[going_on].finish_reason == "length"
    assert len(world.answers[going_on].tokens) == 60


def test_stop_token_ids_end_also_where_eos_does_not() -> None:
    """A token of `stop_token_ids` ends the sequence that names it, with ignore_eos too, and no other."""
    world = World(vocab_size=10)
    going_on = world.submit(PROMPT, max_tokens=60, ignore_eos=True)
    world.run()
    tokens = world.answers[going_on].tokens
    stop = next(token for token in tokens if token not in EOS)
    stopped = world.submit(PROMPT, max_tokens=60, ignore_eos=True, stop_token_ids=(stop,))
    world.run()
    assert world.answers[stopped].finish_reason == "stop" and world.is_right(stopped)
    assert world.answers[stopped].tokens == tokens[: tokens.index(stop) + 1]


def test_context_limit_ends_with_length() -> None:
    """A sequence that fills the context, or the whole KV cache, ends with "length" and every token that fits."""
    world = World(num_blocks=5, block_size=4, max_sequence_tokens=18)
    name = world.submit(PROMPT, max_tokens=500, ignore_eos=True)
    world.run()
    assert (len(world.answers[name].tokens), world.answers[name].finish_reason) == (13, "length")
    world = World(num_blocks=5, block_size=4)
    name = world.submit(PROMPT, max_tokens=500, ignore_eos=True)
    world.run()
    assert (len(world.answers[name].tokens), world.answers[name].finish_reason) == (15, "length")


@pytest.mark.parametrize("prompt", [[], list(range(256)), list(range(300))])
def test_prompt_that_cannot_fit_is_refused_at_once(prompt: list[int]) -> None:
    """Prompts that are empty or leave no room for a token fail without a step; both numbers are in the sentence."""
    world = World(num_blocks=64, block_size=4)
    name = world.submit(prompt)
    assert world.step() is not None
    assert code(world, name) == "internal"
    failure = world.answers[name].failure
    assert failure and str(len(prompt)) in failure.message and "256" in failure.message
    assert world.runner.batches == []


def test_queue_is_bounded() -> None:
    """Beyond max_waiting a request fails with `overloaded`; the others are served."""
    world = World(max_waiting=3)
    names = [world.submit(PROMPT, max_tokens=2) for _ in range(5)]
    world.run()
    assert [code(world, name) for name in names] == [None] * 3 + ["overloaded"] * 2


def test_one_request_cannot_run_twice() -> None:
    """A second sequence of the same id fails; no book is harmed."""
    world = World()
    name = world.submit(PROMPT, max_tokens=2)
    world.engine.submit(world.requests[name])
    done = world.engine.step()
    assert done and [output.failure.code for output in done.outputs if output.failure] == ["internal"]


def test_deadline_ends_running_and_waiting() -> None:
    """Past its deadline a sequence fails with `deadline_exceeded`, also one that waits for an adapter."""
    world = World()
    running = world.submit(PROMPT, max_tokens=200, timeout=0.105, ignore_eos=True)
    loading = world.submit(PROMPT, 1, timeout=0.105)
    world.run(is_loading=False)
    assert code(world, running) == code(world, loading) == "deadline_exceeded"
    assert len(world.answers[running].tokens) == 10
    world.assert_at_rest()


def test_abort_answers_nothing() -> None:
    """An aborted sequence sends nothing more, and an abort after the end harms nobody."""
    world = World()
    name = world.submit(PROMPT, max_tokens=200, ignore_eos=True)
    world.step()
    num_before = len(world.answers[name].tokens)
    world.engine.abort(name)
    world.engine.abort(name)
    world.engine.abort("never seen")
    assert world.step() is None
    assert len(world.answers[name].tokens) == num_before == 1
    world.assert_at_rest()


def test_row_with_nonfinite_logits_ends_alone() -> None:
    """Its sequence fails with `nonfinite_logits` and the adapter's name; its neighbours do not notice."""
    world = World()
    world.runner.nonfinite_on = {digest_of(1)}
    bad, good, base = world.submit(PROMPT, 1), world.submit(PROMPT, 2), world.submit(PROMPT)
    world.run()
    assert code(world, bad) == "nonfinite_logits"
    failure = world.answers[bad].failure
    assert failure and digest_of(1)[:12] in failure.message
    assert world.is_right(good) and world.is_right(base)
    world.assert_at_rest()


def test_step_that_raises_fails_only_who_raises_alone() -> None:
    """The rows of a batch that raises run one by one; only the poisoned one fails, with `internal`."""
    world = World(vocab_size=499)
    good = [world.submit([*PROMPT, at], max_tokens=30) for at in range(3)]
    poisoned = world.submit([10, 499], max_tokens=30)
    world.runner.raises_on = {499}
    world.run()
    assert code(world, poisoned) == "internal"
    assert all(world.is_right(name) for name in good)
    world.assert_at_rest()


@pytest.mark.parametrize("where", ["Sequence.of", "Engine._refusal", "Engine._append", "FakeRunner._sample"])
def test_what_raises_for_one_sequence_ends_it_alone(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever raises beside the forward fails the sequence that it was done for; no other row runs again for it."""
    world = World(vocab_size=499)
    good = [world.submit([*PROMPT, at], max_tokens=9, ignore_eos=True) for at in range(3)]
    kind, name = where.split(".")
    owner: Any = {"Sequence": Sequence, "Engine": Engine, "FakeRunner": FakeRunner}[kind]
    is_of_class, real = kind == "Sequence", getattr(owner, name)

    def raises(*given: Any) -> Any:
        if POISON in str(given):
            if kind == "FakeRunner":
                return Sampled(error="it failed", is_internal=True)
            raise RuntimeError("it failed")
        return real(*(given[1:] if is_of_class else given))

    monkeypatch.setattr(owner, name, classmethod(raises) if is_of_class else raises)
    bad = world.submit([*PROMPT, int(POISON)], max_tokens=9, ignore_eos=True)
    world.run()
    assert code(world, bad) == "internal"
    assert all(world.is_right(one) for one in good)
    assert len(world.runner.batches) <= 10
    world.assert_at_rest()


def test_timing_is_on_the_first_output() -> None:
    """The first output tells the milliseconds in the queue, for the adapter, and to the token."""
    world = World()
    name = world.submit(PROMPT, 1, max_tokens=3, ignore_eos=True)
    world.step(seconds=0.010)  # the load starts
    world.step(seconds=0.100)
    world.run()
    first, *others = world.answers[name].outputs
    assert first.timing is not None
    assert first.timing.queued_ms == pytest.approx(10, abs=1)
    assert first.timing.load_ms == pytest.approx(110, abs=1)
    assert first.timing.ttft_ms == pytest.approx(120, abs=1)
    assert all(output.timing is None for output in others)


def test_cached_tokens_are_told() -> None:
    """A prompt that was asked before comes from the cache but for its last token, and hit rates are counted."""
    world = World(block_size=4)
    prompt = prompt_of(random.Random(0), 14)
    for cached in (0, 13):
        name = world.submit(prompt, max_tokens=3, ignore_eos=True)
        world.run()
        assert {output.cached_tokens for output in world.answers[name].outputs} == {cached}
    stats = world.engine.stats()
    assert (stats.cache_hit_tokens_total, stats.cache_query_tokens_total) == (13, 28)


@pytest.mark.parametrize("others", ["alike", "another tenant", "no cache"])
def test_what_several_begin_with_is_computed_once(others: str) -> None:
    """Sequences of a tenant that come at once and begin alike wait for the first to compute that; others do not."""
    world = World(block_size=4, max_batch_tokens=1024, is_prefix_cached=others != "no cache")
    draw = random.Random(0)
    beginning = prompt_of(draw, 22)
    names = [
        world.submit(
            [*beginning, *prompt_of(draw, 5)],
            max_tokens=2,
            ignore_eos=True,
            namespace="b" if others == "another tenant" and number else "a",
        )
        for number in range(3)
    ]
    world.run()
    first, second, third = (world.answers[name].outputs[0].cached_tokens for name in names)
    assert first == 0 and (second >= 22) == (others == "alike") and (third >= 22) == (others != "no cache")
    assert all(world.is_right(name) for name in names)
    world.assert_at_rest()


def test_logprobs_are_handed_on() -> None:
    """Each token of a sequence that asked for them has its logprobs."""
    world = World()
    name = world.submit(PROMPT, max_tokens=3, logprobs=2, ignore_eos=True)
    world.run()
    assert [len(output.logprobs) for output in world.answers[name].outputs] == [1, 1, 1]


def test_what_must_be_scored_is_computed_though_it_is_cached() -> None:
    """The cache gives a prompt's beginning up to its first scored token; what follows is computed, and scored."""
    world = World(block_size=4)
    prompt = prompt_of(random.Random(0), 30)
    for scored_from, cached in ((1, 0), (1, 0), (9, 8), (20, 19), (30, 29), (99, 29)):
        name = world.submit(prompt, max_tokens=0, prompt_logprobs=2, scored_from=scored_from)
        world.run()
        assert world.is_right(name) and len(world.answers[name].scores) == max(0, 30 - scored_from)
        assert {output.cached_tokens for output in world.answers[name].outputs} == {cached}, scored_from
        assert [output.timing is None for output in world.answers[name].outputs][-1] is False
    world.assert_at_rest()


def test_what_predicts_nothing_is_not_computed() -> None:
    """The last token of a text that is only scored predicts nothing, and is not computed."""
    world = World(block_size=4)
    prompt = prompt_of(random.Random(0), 12)
    for scored_from, num_computed in ((1, 11), (9, 3), (11, 1)):
        before = world.engine.stats().tokens_total
        name = world.submit(prompt, max_tokens=0, prompt_logprobs=0, scored_from=scored_from)
        world.run()
        assert world.is_right(name) and len(world.answers[name].scores) == 12 - scored_from
        assert world.engine.stats().tokens_total - before == num_computed
    world.assert_at_rest()


def test_a_step_scores_a_bounded_number_of_tokens() -> None:
    """Rows that score share a step's bound on logits; those that only decode get a token in each step all the same."""
    world = World(max_batch_tokens=400, num_blocks=400, max_running=8)
    decoding = world.submit(PROMPT, max_tokens=12, ignore_eos=True)
    names = [world.submit(prompt_of(random.Random(at), 300), max_tokens=1, prompt_logprobs=0) for at in range(2)]
    num_steps = 0
    while world.engine.has_work:
        done = world.step()
        num_steps += 1
        assert done is not None and sum(len(output.scores) for output in done.outputs) <= 128
        assert len(world.answers[decoding].tokens) == min(num_steps, 12)
    assert all(world.is_right(name) for name in (decoding, *names))


def test_a_resumed_request_is_scored_once() -> None:
    """An engine that goes on for one that died scores the tokens that are left, and the answer is whole."""
    world = World(max_batch_tokens=16)
    name = world.submit(prompt_of(random.Random(0), 60), max_tokens=3, prompt_logprobs=1, ignore_eos=True)
    request, wanted = Request(world.requests[name]), World(max_batch_tokens=16)
    for _ in range(2):
        world.step()
    for output in world.answers[name].outputs:
        request.note(output)
    assert 0 < request.num_scored < 59
    wanted.requests[name], wanted.answers[name] = world.requests[name], world.answers[name]
    wanted.engine.submit(request.resumed())
    wanted.run()
    assert wanted.is_right(name)


def test_prompts_are_chunked_and_decoding_goes_on() -> None:
    """Every running sequence gets a token in every step while a long prompt is computed in chunks."""
    world = World(max_batch_tokens=16, num_blocks=100)
    running = [world.submit(PROMPT, max_tokens=100, ignore_eos=True) for _ in range(2)]
    world.step()
    long = world.submit(prompt_of(random.Random(0), 140), max_tokens=1)
    num_steps = 0
    while not world.answers[long].is_over:
        before = [len(world.answers[name].tokens) for name in running]
        world.step()
        num_steps += 1
        assert [len(world.answers[name].tokens) for name in running] == [count + 1 for count in before]
    assert num_steps == 10  # 140 tokens, 14 a step
    assert world.is_right(long)


def test_preempted_sequences_go_on_where_they_were() -> None:
    """The last admitted sequence recomputes later if blocks run out; its answer is right and no token is sent twice."""
    world = World(num_blocks=10, block_size=4, is_prefix_cached=False)
    names = [world.submit([*PROMPT, at], 1, max_tokens=25, ignore_eos=True) for at in range(4)]
    world.run()
    assert world.engine.stats().preemptions_total > 0
    assert all(world.is_right(name) for name in names)
    world.assert_at_rest()


def test_preempted_sequences_keep_their_pins() -> None:
    """An adapter stays in its slot for a sequence that was preempted."""
    world = World(num_blocks=8, block_size=4, slot_bytes=2 * DIGEST_BYTES, is_prefix_cached=False)
    world.submit(PROMPT, 1, max_tokens=20, ignore_eos=True)
    world.submit(PROMPT, 2, max_tokens=20, ignore_eos=True)
    while not world.engine.stats().preemptions_total:
        world.spawner.run_all()
        world.step()
    assert world.engine.stats().num_pins == 2
    assert world.engine.stats().num_running == 1


def test_an_adapter_loads_while_its_sequence_still_queues() -> None:
    """An adapter is loaded while its sequence waits behind full rows: when a row is free the adapter is there."""
    world = World(max_running=1)
    world.submit(PROMPT, max_tokens=9, ignore_eos=True)
    world.step()
    queued = world.submit(PROMPT, 1, max_tokens=2)
    world.step()
    world.spawner.run_all()
    world.step()
    assert world.engine.adapters.states() == {digest_of(1): "host"} and world.engine.stats().num_waiting == 1
    world.run(is_loading=False)
    assert world.is_right(queued)


def test_loading_stalls_nobody() -> None:
    """Other sequences' steps go on while an adapter loads, and the stall time stays zero."""
    world = World()
    base = world.submit(PROMPT, max_tokens=20, ignore_eos=True)
    loading = world.submit(PROMPT, 1, max_tokens=2)
    for _ in range(22):
        world.step()
    assert world.is_right(base)
    assert not world.answers[loading].outputs
    assert world.engine.stats().stall_seconds_total == 0
    world.run()
    assert world.is_right(loading)


@pytest.mark.parametrize(("seconds", "stall"), [(0.0015, 0.0), (0.0025, 0.0025), (0.5, 0.5)])
def test_copies_between_steps_count_as_stall(seconds: float, stall: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of a copy is counted while others run, as stall if it is over 2 ms; while nobody runs it is not."""
    world = World()
    put = world.adapter_slots.insert

    def slow(packed: FakePacked) -> int:
        world.clock.now += seconds
        return put(packed)

    monkeypatch.setattr(world.adapter_slots, "insert", slow)
    world.submit(PROMPT, 1, max_tokens=50, ignore_eos=True)
    world.step()
    world.spawner.run_all()
    world.step()
    assert world.engine.stats().stall_seconds_total == world.engine.stats().adapter_seconds_total == 0
    world.submit(PROMPT, 2, max_tokens=2)
    world.run()
    assert world.engine.stats().stall_seconds_total == pytest.approx(stall)
    assert world.engine.stats().adapter_seconds_total == pytest.approx(seconds)


def test_adapter_that_fails_to_load_fails_those_who_wait() -> None:
    """Sequences that wait for it get `adapter_failed` once; others are served; after the back-off it is tried again."""
    world = World()
    world.loader.errors[digest_of(1)] = OSError(5, "Input/output error", "/secret/path")
    bad = [world.submit(PROMPT, 1) for _ in range(3)]
    good = world.submit(PROMPT, 2, max_tokens=2)
    world.run()
    assert {code(world, name) for name in bad} == {"adapter_failed"}
    failure = world.answers[bad[0]].failure
    assert failure is not None and "Input/output error" in failure.message and "/secret" not in failure.message
    assert world.is_right(good)
    at_once = world.submit(PROMPT, 1)
    world.run()
    assert code(world, at_once) == "adapter_failed"
    assert world.loader.loaded.count(digest_of(1)) == 1
    world.clock.now += 1
    del world.loader.errors[digest_of(1)]
    later = world.submit(PROMPT, 1, max_tokens=2)
    world.run()
    assert world.is_right(later)
    world.assert_at_rest()


def test_adapters_that_do_not_fit_together_are_refused() -> None:
    """Adapters whose sizes together exceed the slots fail with `adapter_too_large`, as does one alone."""
    world = World(slot_bytes=25)
    world.loader.sizes[digest_of(3)] = 26
    together = world.submit(PROMPT, 0, 1, 2)
    alone = world.submit(PROMPT, 3)
    world.run()
    assert code(world, together) == code(world, alone) == "adapter_too_large"
    world.assert_at_rest()


def test_slots_that_raise_fails_that_adapter_alone() -> None:
    """A device that cannot take a copy fails those who wait for it, and nobody else."""
    world = World()
    world.adapter_slots.slot_bytes = DIGEST_BYTES
    first, second = world.submit(PROMPT, 1, max_tokens=3), world.submit(PROMPT, 2, max_tokens=3)
    world.run()
    assert sorted([code(world, first) or "", code(world, second) or ""]) == ["", "adapter_failed"]
    world.assert_at_rest()


def test_stats_count() -> None:
    """Steps, rows and tokens add up."""
    world = World(max_batch_tokens=64)
    world.submit(PROMPT, max_tokens=3, ignore_eos=True)
    world.submit([9], max_tokens=3, ignore_eos=True)
    world.run()
    stats = world.engine.stats()
    assert (stats.steps_total, stats.rows_total, stats.tokens_total) == (3, 6, 6 + 4)


def test_failure_is_one_sentence_for_users() -> None:
    """A failure has a code of the error tree and a message."""
    world = World(max_waiting=1)
    world.submit(PROMPT)
    name = world.submit(PROMPT)
    world.run()
    failure = world.answers[name].failure
    assert isinstance(failure, EngineFailure) and failure.message
