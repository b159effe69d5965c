import pytest

from server.core import AdapterRef, Sampling
from server.engine.blocks import BlockPool, BlockTable
from server.engine.messages import Submit
from server.engine.scheduler import Scheduler, StepLimits, StepPlan
from server.engine.sequence import Sequence


class Residents:
    """Tells which digests are in slots and in host memory, as a test sets them."""

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
    refs = tuple(AdapterRef(digest) for digest in adapters)
    submit = Submit(name, namespace, [1] * num_tokens, Sampling(), 1e9, arrived, refs, share, max_running)
    sequence = Sequence.of(submit)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler, residents: Residents | None = None, now: float = 0.0) -> list[tuple[str, int]]:
    """Plan a step and do what running it does."""
    plan = scheduler.plan(residents or Residents(), now)
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
    """Rows are at most max_running; the next sequence is admitted when one ends."""
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
    """The last admitted gives up its blocks when they run out, and is admitted before those that wait."""
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
    """Smaller sequences do not pass the first in line if blocks are short for it."""
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
    """A sequence that waits for an adapter holds up none behind it, and starts when the adapter is there."""
    planner, residents = scheduler(), Residents()
    add(planner, "a", 1, "A")
    add(planner, "b", 1)
    assert step(planner, residents) == [("b", 1)]
    residents.slots.add("A")
    assert step(planner, residents) == [("b", 1), ("a", 1)]


def test_sequence_that_lacks_one_of_two_adapters_is_skipped() -> None:
    """Every adapter of a sequence must be in a slot before it starts."""
    planner, residents = scheduler(), Residents("A")
    add(planner, "a", 1, "AB")
    assert step(planner, residents) == []
    residents.slots.add("B")
    assert step(planner, residents) == [("a", 1)]


def test_time_without_the_adapter_is_told_apart() -> None:
    """The seconds that a sequence was skipped for its adapter are its load time, and only these."""
    planner, residents = scheduler(), Residents()
    sequence = add(planner, "a", 1, "A")
    step(planner, residents, now=5.0)
    step(planner, residents, now=6.0)
    residents.slots.add("A")
    step(planner, residents, now=7.5)
    assert sequence.load_seconds == 2.5


def bypass(planner: Scheduler, residents: Residents, times: int) -> None:
    """Let so many short sequences with A come and go."""
    for at in range(times):
        passing = add(planner, f"passing {planner.num_waiting} {at} {id(residents)}", 1, "A")
        step(planner, residents)
        assert passing in planner.running
        planner.remove(passing)


def test_starving_sequence_holds_newcomers_with_adapters_back() -> None:
    """Once max_bypass others with adapters passed one that lacks only slots, it is wanted first and no more pass it."""
    planner, residents = scheduler(max_bypass=3), Residents("A", host="B")
    starving = add(planner, "starving", 1, "B")
    bypass(planner, residents, 3)
    assert step(planner, residents) == []
    add(planner, "held", 1, "A", namespace="another")
    add(planner, "base", 1)
    assert step(planner, residents) == [("base", 1)]
    assert planner.wanted() == ["B", "A"]
    residents.slots = {"B"}
    assert ("starving", 1) in step(planner, residents)
    assert starving in planner.running
    residents.slots = {"A", "B"}
    assert ("held", 1) in step(planner, residents)


def test_loading_is_no_reason_to_hold_others_back() -> None:
    """A sequence whose adapter is not in memory yet may be passed for ever."""
    planner, residents = scheduler(max_bypass=3), Residents("A")
    add(planner, "loading", 1, "B")
    bypass(planner, residents, 10)


def test_hold_ends_with_the_starving_sequence() -> None:
    """The sequences that are held run when the starving one goes (deadline, abort)."""
    planner, residents = scheduler(max_bypass=1), Residents("A", host="B")
    starving = add(planner, "starving", 1, "B")
    bypass(planner, residents, 1)
    add(planner, "held", 1, "A")
    assert step(planner, residents) == []
    planner.remove(starving)
    assert step(planner, residents) == [("held", 1)]


def test_wanted_is_in_the_order_of_admission() -> None:
    """Adapters are wanted in the order in which the queue will be served, namespaces in turn, each digest once."""
    planner = scheduler()
    for name, adapters, namespace in (("1", "A", "t"), ("2", "B", "t"), ("3", "C", "u"), ("4", "AD", "u")):
        add(planner, name, 10, adapters, namespace)
    assert planner.wanted() == ["A", "C", "B", "D"]


def test_most_of_one_namespace_run_at_once() -> None:
    """A namespace has no more running than it may, and others pass it."""
    planner = scheduler()
    ours = [add(planner, f"ours{at}", 1, namespace="ours", max_running=2) for at in range(4)]
    add(planner, "theirs", 1, namespace="theirs")
    assert sorted(name for name, _ in step(planner)) == ["ours0", "ours1", "theirs"]
    planner.remove(ours[0])
    step(planner)
    assert [sequence.id for sequence in planner.running] == ["theirs", "ours1", "ours2"]


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
