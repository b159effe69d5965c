import pytest

from server.core import AdapterRef, Sampling
from server.engine.blocks import BlockPool, BlockTable
from server.engine.messages import Submit
from server.engine.scheduler import Scheduler, StepLimits, StepPlan
from server.engine.sequence import Sequence


class Wardrobe:
    """Which digests are in slots and in host memory, as a test says."""

    def __init__(self, slots: str = "", host: str = "") -> None:
        self.slots, self.host = set(slots), set(host)

    def are_in_slots(self, digests: tuple[str, ...]) -> bool:
        return set(digests) <= self.slots

    def are_in_memory(self, digests: tuple[str, ...]) -> bool:
        return set(digests) <= self.slots | self.host


def scheduler(
    num_blocks: int = 100,
    max_batch_tokens: int = 8,
    max_running: int = 4,
    max_bypass: int = 3,
    max_shared_tokens: int | None = 1000,
    max_waiting: int = 100,
) -> Scheduler:
    limits = StepLimits(
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
        max_waiting=max_waiting,
        max_bypass=max_bypass,
        max_shared_tokens=max_shared_tokens,
    )
    return Scheduler(limits, BlockPool(num_blocks, 4, is_cached=False))


def add(
    scheduler: Scheduler,
    name: str,
    num_tokens: int,
    adapters: str = "",
    namespace: str = "t",
    share: float = 1.0,
    max_running: int | None = None,
    arrived: float = 0.0,
) -> Sequence:
    worn = tuple(AdapterRef(digest) for digest in adapters)
    submit = Submit(name, namespace, [1] * num_tokens, Sampling(), 1e9, arrived, worn, share, max_running)
    sequence = Sequence.of(submit)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler, wardrobe: Wardrobe | None = None, now: float = 0.0) -> list[tuple[str, int]]:
    """Plan a step and do what running it does."""
    plan = scheduler.plan(wardrobe or Wardrobe(), now)
    commit(plan)
    return [(sequence.id, num_tokens) for sequence, num_tokens in plan.rows]


def commit(plan: StepPlan) -> None:
    for sequence, num_tokens in plan.rows:
        sequence.num_computed += num_tokens
        if sequence.remainder == 0:
            sequence.tokens.append(1)


def test_prefill_and_decode_share_a_step_under_the_budget() -> None:
    """Decoding rows come first, then chunks of prompts in order of admission, then new ones, up to the budget."""
    planner = scheduler()
    add(planner, "a", 3)
    add(planner, "b", 10)
    assert step(planner) == [("a", 3), ("b", 5)]
    add(planner, "c", 9)
    assert step(planner) == [("a", 1), ("b", 5), ("c", 2)]
    assert step(planner) == [("a", 1), ("b", 1), ("c", 6)]
    assert step(planner) == [("a", 1), ("b", 1), ("c", 1)]


def test_rows_are_bounded() -> None:
    """No more than max_running sequences run; the next is admitted when one ends."""
    planner = scheduler()
    sequences = [add(planner, name, 1) for name in "abcdef"]
    assert [name for name, _ in step(planner)] == ["a", "b", "c", "d"]
    planner.remove(sequences[1])
    assert [name for name, _ in step(planner)] == ["a", "c", "d", "e"]


def test_limits_that_would_starve_decoding_are_refused() -> None:
    """A budget below the number of rows is refused with both numbers."""
    with pytest.raises(ValueError, match=r"max_running = 9 .* max_batch_tokens = 8"):
        scheduler(max_running=9)


def test_last_admitted_is_preempted_and_comes_back_first() -> None:
    """When blocks run out the last admitted gives up its blocks and is admitted before whoever waits."""
    planner = scheduler(num_blocks=4)
    first, second = add(planner, "a", 4), add(planner, "b", 4)
    while len(first.tokens) < 9:
        assert step(planner) in ([("a", 4), ("b", 4)], [("a", 1), ("b", 1)])
    third = add(planner, "c", 1)
    assert step(planner) == [("a", 1)]
    assert second.is_preempted and second.table.blocks == [] and second.num_computed == 0
    assert [*planner.waiting()] == [second, third]
    assert step(planner) == [("a", 1)]
    planner.remove(first)
    assert step(planner) == [("b", 8)]
    assert step(planner) == [("b", 1)]
    planner.remove(second)
    assert step(planner) == [("c", 1)]


def test_preempted_sequences_come_back_in_their_old_order() -> None:
    """Two that were preempted wait in the order in which they had been admitted."""
    planner = scheduler(num_blocks=8, max_batch_tokens=12)
    sequences = [add(planner, name, 4) for name in "abc"]
    while len(sequences[0].tokens) < 9:
        step(planner)
    assert step(planner) == [("a", 1), ("b", 1)]
    assert sequences[2].is_preempted
    planner.pool.extend(BlockTable(b""), 4 * planner.pool.num_free)
    while sequences[1] in planner.running:
        step(planner)
    assert [*planner.waiting()] == sequences[1:]


def test_who_does_not_fit_keeps_its_place() -> None:
    """Where blocks are short for the first in line nobody smaller passes it."""
    planner = scheduler(num_blocks=6)
    running = add(planner, "a", 12)
    step(planner)
    add(planner, "big", 16)
    add(planner, "small", 1)
    step(planner)
    assert [sequence.id for sequence in planner.running] == ["a"]
    planner.remove(running)
    assert ("big", 8) in step(planner)


def test_sequence_without_its_adapter_is_skipped() -> None:
    """Who waits for an adapter holds up nobody behind it, and starts when the adapter is there."""
    planner, wardrobe = scheduler(), Wardrobe()
    add(planner, "a", 1, "A")
    add(planner, "b", 1)
    assert step(planner, wardrobe) == [("b", 1)]
    wardrobe.slots.add("A")
    assert step(planner, wardrobe) == [("b", 1), ("a", 1)]


def test_who_lacks_one_of_two_hats_is_skipped() -> None:
    """All of a sequence's adapters must be in slots."""
    planner, wardrobe = scheduler(), Wardrobe("A")
    add(planner, "a", 1, "AB")
    assert step(planner, wardrobe) == []
    wardrobe.slots.add("B")
    assert step(planner, wardrobe) == [("a", 1)]


def test_time_without_the_adapter_is_told_apart() -> None:
    """The seconds that a sequence was skipped for its adapter are its load time, and only these."""
    planner, wardrobe = scheduler(), Wardrobe()
    sequence = add(planner, "a", 1, "A")
    step(planner, wardrobe, now=5.0)
    step(planner, wardrobe, now=6.0)
    wardrobe.slots.add("A")
    step(planner, wardrobe, now=7.5)
    assert sequence.load_seconds == 2.5


def bypass(planner: Scheduler, wardrobe: Wardrobe, times: int) -> None:
    """So many short sequences with A come and go."""
    for at in range(times):
        passing = add(planner, f"passing {planner.num_waiting} {at} {id(wardrobe)}", 1, "A")
        step(planner, wardrobe)
        assert passing in planner.running
        planner.remove(passing)


def test_starving_sequence_holds_newcomers_with_hats_back() -> None:
    """Once max_bypass others with hats passed one that lacks only a slot, it is wanted first and no more pass it."""
    planner, wardrobe = scheduler(max_bypass=3), Wardrobe("A", host="B")
    starving = add(planner, "starving", 1, "B")
    bypass(planner, wardrobe, 3)
    assert step(planner, wardrobe) == []
    add(planner, "held", 1, "A", namespace="another")
    add(planner, "base", 1)
    assert step(planner, wardrobe) == [("base", 1)]
    assert planner.wanted() == ["B", "A"]
    wardrobe.slots = {"B"}
    assert ("starving", 1) in step(planner, wardrobe)
    assert starving in planner.running
    wardrobe.slots = {"A", "B"}
    assert ("held", 1) in step(planner, wardrobe)


def test_loading_is_no_reason_to_hold_others_back() -> None:
    """A sequence whose adapter is not in memory yet may be passed for ever."""
    planner, wardrobe = scheduler(max_bypass=3), Wardrobe("A")
    add(planner, "loading", 1, "B")
    bypass(planner, wardrobe, 10)


def test_hold_ends_with_the_starving_sequence() -> None:
    """When the starving sequence goes (deadline, abort) the held ones run."""
    planner, wardrobe = scheduler(max_bypass=1), Wardrobe("A", host="B")
    starving = add(planner, "starving", 1, "B")
    bypass(planner, wardrobe, 1)
    add(planner, "held", 1, "A")
    assert step(planner, wardrobe) == []
    planner.remove(starving)
    assert step(planner, wardrobe) == [("held", 1)]


def test_least_served_namespace_comes_first() -> None:
    """Admission goes to the namespace with the fewest served tokens, of equals who asks less; by arrival inside it."""
    planner = scheduler(max_running=1, max_batch_tokens=100)
    for at in range(3):
        add(planner, f"greedy{at}", 10, namespace="greedy")
    for at in range(3):
        add(planner, f"modest{at}", 5, namespace="modest")
    order = []
    while planner.num_waiting:
        order += [name for name, _ in step(planner)]
        planner.remove(planner.running[0])
    assert order == ["greedy0", "modest0", "modest1", "modest2", "greedy1", "greedy2"]


def test_two_backlogged_namespaces_share_tokens() -> None:
    """One that sends long prompts and one that sends short ones are served equally many tokens."""
    planner = scheduler(max_running=4, max_batch_tokens=32, num_blocks=1000)
    for at in range(200):
        add(planner, f"long{at}", 40, namespace="long")
        add(planner, f"short{at}", 8, namespace="short")
    for _ in range(100):
        step(planner)
        for sequence in [sequence for sequence in planner.running if len(sequence.tokens) - sequence.num_prompt >= 4]:
            planner.remove(sequence)
    long, short = planner.fairness.virtual_counter("long"), planner.fairness.virtual_counter("short")
    assert long > 500
    assert abs(long - short) <= 4 * 44


def test_idle_namespaces_save_up_a_steps_tokens_at_most() -> None:
    """A newcomer starts so far below the least served of those that are active, and what one was served it stays."""
    planner = scheduler(max_running=3, max_batch_tokens=40)
    add(planner, "a", 100, namespace="old")
    step(planner)
    step(planner)
    add(planner, "b", 1, namespace="new")
    assert (planner.fairness.virtual_counter("old"), planner.fairness.virtual_counter("new")) == (80, 40)
    again = add(planner, "c", 30, namespace="again")
    for _ in range(8):
        step(planner)
    served = planner.fairness.virtual_counter("again")
    assert planner.fairness.virtual_counter("new") - 40 < served < planner.fairness.virtual_counter("new")
    planner.remove(again)
    add(planner, "d", 1, namespace="again")
    assert planner.fairness.virtual_counter("again") == served


def test_namespaces_are_forgotten() -> None:
    """When nothing waits or runs nothing is remembered of anybody: counters do not grow without end."""
    planner = scheduler()
    sequences = [add(planner, name, 1, namespace=name) for name in "abc"]
    step(planner)
    for sequence in sequences:
        planner.remove(sequence)
    assert [planner.fairness.virtual_counter(name) for name in "abc"] == [0, 0, 0]


def test_recomputed_tokens_are_not_charged() -> None:
    """A namespace pays once for a token, however often preemption makes it be computed."""
    planner = scheduler(num_blocks=4, max_batch_tokens=100)
    first, second = add(planner, "a", 4, namespace="a"), add(planner, "b", 4, namespace="b")
    while not second.is_preempted:
        step(planner)
    num_computed = len(second.tokens) - 1
    assert planner.fairness.virtual_counter("b") == num_computed
    planner.remove(first)
    step(planner)
    assert second in planner.running
    assert planner.fairness.virtual_counter("b") == num_computed + 1


def test_cached_tokens_are_not_charged() -> None:
    """What the prefix cache gives costs a namespace nothing."""
    planner = scheduler(max_batch_tokens=100)
    planner.pool.is_cached = True
    first = add(planner, "a", 9)
    plan = planner.plan(Wardrobe(), 0.0)
    planner.pool.publish(first.table, first.tokens, 9)
    commit(plan)
    add(planner, "b", 9)
    planner.plan(Wardrobe(), 0.0)
    assert planner.fairness.virtual_counter("t") == 9 + 1 + 1


def test_wanted_is_in_the_order_of_admission() -> None:
    """Adapters are wanted in the order in which the queue will be served, namespaces in turn, each digest once."""
    planner = scheduler()
    for name, adapters, namespace in (("1", "A", "t"), ("2", "B", "t"), ("3", "C", "u"), ("4", "AD", "u")):
        add(planner, name, 10, adapters, namespace)
    assert planner.wanted() == ["A", "C", "B", "D"]


def test_rows_are_taken_from_who_holds_more_than_its_share() -> None:
    """Who is first in line and holds less than its share gets a row of one that holds more, until both hold theirs."""
    planner = scheduler(max_running=4)
    loud = [add(planner, f"loud{at}", 1, namespace="loud") for at in range(8)]
    step(planner)
    assert planner.running == loud[:4]
    for at in range(3):
        add(planner, f"modest{at}", 1, namespace="modest")
        step(planner)
    assert [sequence.id for sequence in planner.running] == ["loud0", "loud1", "modest0", "modest1"]
    assert loud[3].is_preempted and loud[3].first_admitted is not None
    planner.remove(planner.running[0])
    step(planner)
    assert [sequence.id for sequence in planner.running] == ["loud1", "modest0", "modest1", "modest2"]  # least served


def test_blocks_are_taken_from_who_holds_more_than_its_share() -> None:
    """Where rows are free and blocks are not, sequences of the one that holds most of them go back."""
    planner = scheduler(num_blocks=16, max_running=8, max_batch_tokens=100)
    loud = [add(planner, f"loud{at}", 12, namespace="loud") for at in range(5)]
    step(planner)
    assert planner.running == loud[:4]
    add(planner, "modest", 4, namespace="modest")
    step(planner)
    assert [sequence.id for sequence in planner.running] == ["loud0", "loud1", "loud2", "modest"]


def test_a_share_that_cannot_be_split_is_not_taken() -> None:
    """One row is not taken to and fro: who would hold less than its share without it keeps it."""
    planner = scheduler(max_running=1)
    first = add(planner, "first", 1, namespace="a")
    step(planner)
    add(planner, "second", 1, namespace="b")
    for _ in range(5):
        assert step(planner) == [("first", 1)]
    assert not first.is_preempted


def test_who_holds_most_gives_up_blocks_first() -> None:
    """When blocks run out while all decode, the namespace with most of them loses its last, whoever came last."""
    planner = scheduler(num_blocks=7, max_running=4, max_batch_tokens=100)
    loud = [add(planner, f"loud{at}", 4, namespace="loud") for at in range(3)]
    step(planner)
    modest = add(planner, "modest", 4, namespace="modest")
    for _ in range(2):
        step(planner)
    assert len(planner.running) == 3 and loud[2].is_preempted
    assert modest in planner.running


def test_most_of_one_namespace_run_at_once() -> None:
    """A namespace has no more running than it may, and others pass it."""
    planner = scheduler()
    ours = [add(planner, f"ours{at}", 1, namespace="ours", max_running=2) for at in range(4)]
    add(planner, "theirs", 1, namespace="theirs")
    assert sorted(name for name, _ in step(planner)) == ["ours0", "ours1", "theirs"]
    planner.remove(ours[0])
    step(planner)
    assert [sequence.id for sequence in planner.running] == ["theirs", "ours1", "ours2"]


def test_steps_are_short_while_several_are_about() -> None:
    """Prompts get few tokens of a step while another namespace is there, or was half a minute ago; all when not."""
    planner = scheduler(max_batch_tokens=16, max_shared_tokens=None)
    other = add(planner, "other", 1, namespace="other")
    add(planner, "long", 100, namespace="ours")
    assert step(planner, now=1.0) == [("other", 1), ("long", 3)]
    planner.remove(other)
    assert step(planner, now=31.0) == [("long", 4)]
    assert step(planner, now=31.1) == [("long", 16)]


def test_a_prompt_of_who_has_little_is_computed_at_once() -> None:
    """Beside one that holds most, all of another's prompt is in its first step, and nothing else that is long."""
    planner = scheduler(max_batch_tokens=32, max_shared_tokens=4)
    add(planner, "loud", 40, namespace="loud")
    assert step(planner) == [("loud", 32)]
    add(planner, "modest", 17, namespace="modest")
    assert step(planner) == [("modest", 17)]
    assert step(planner) == [("modest", 1), ("loud", 4)]


def test_long_prompts_have_time_while_who_was_served_less_decodes() -> None:
    """One that was served more gets few tokens a step, also where it holds little: the other has tokens to wait for."""
    planner = scheduler(max_batch_tokens=32, max_shared_tokens=4)
    add(planner, "other", 1, namespace="other")
    add(planner, "long", 60, namespace="long")
    step(planner)
    step(planner)
    assert planner.fairness.virtual_counter("long") > planner.fairness.virtual_counter("other")
    assert step(planner) == [("other", 1), ("long", 4)]


def test_one_cannot_fill_the_queue_for_others() -> None:
    """A full queue takes no more of who fills it; who has few in it gets in, until twice as many wait as may."""
    planner = scheduler(max_waiting=16)
    for at in range(16):
        assert not planner.is_full("loud")
        add(planner, f"loud{at}", 1, namespace="loud")
    assert planner.is_full("loud")
    for other in range(8):
        for at in range(2):
            assert not planner.is_full(f"{other}")
            add(planner, f"{other}-{at}", 1, namespace=f"{other}")
        assert planner.is_full(f"{other}")
    assert planner.num_waiting == 32 and planner.is_full("newcomer")


def test_a_larger_share_is_charged_less() -> None:
    """A namespace of share 3 counts a third of its tokens, and comes first three times as often."""
    planner = scheduler(max_running=1, max_batch_tokens=100)
    for at in range(8):
        add(planner, f"big{at}", 6, namespace="big", share=3.0)
        add(planner, f"small{at}", 6, namespace="small")
    order = ""
    while planner.num_waiting > 4:
        order += step(planner)[0][0][0]
        planner.remove(planner.running[0])
    assert order[:8].count("b") == 6


def test_who_asks_little_saves_up_a_steps_tokens_at_most() -> None:
    """One whose sequence runs on while another is served much starts so far below it when it asks for more."""
    planner = scheduler(max_running=3, max_batch_tokens=100)
    add(planner, "little", 1, namespace="little")
    for at in range(3):
        add(planner, f"much{at}", 90, namespace="much")
        step(planner)
    add(planner, "more", 10, namespace="little")
    assert planner.fairness.virtual_counter("little") >= 180 - 100
