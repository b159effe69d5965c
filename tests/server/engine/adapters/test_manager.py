import threading
from collections import Counter

import pytest

from adapters_store.errors import ArtifactCorruptError
from server.engine.adapters.entry import MAX_FAILURES, QUARANTINE_S
from server.engine.adapters.manager import AdapterManager, Budgets
from server.engine.blocks import InvariantError
from server.model.fake import FakePacked, FakeSlots
from tests.server.engine.spawners import LateSpawner, ThreadSpawner
from tests.server.engine.world import ArtifactLoader, Clock


class Room:
    """A manager over fakes: 3 slots and 4 places in host memory for adapters of 10 bytes."""

    def __init__(
        self, slot_bytes: int = 30, host_bytes: int = 40, copy_bytes: int = 1000, max_loading: int = 8
    ) -> None:
        self.adapter_slots, self.loader, self.spawner, self.clock = (
            FakeSlots(slot_bytes),
            ArtifactLoader(),
            LateSpawner(),
            Clock(),
        )
        budgets = Budgets(
            slot_bytes=slot_bytes, host_bytes=host_bytes, copy_bytes_per_step=copy_bytes, max_loading=max_loading
        )
        self.manager: AdapterManager[FakePacked] = AdapterManager(
            self.adapter_slots, self.loader, budgets, self.spawner, self.clock
        )
        self.users: Counter[str] = Counter()
        self.pins: Counter[str] = Counter()

    def use(self, digests: str) -> None:
        self.manager.use(digests)
        self.users.update(digests)

    def pin(self, digests: str) -> None:
        self.manager.pin(digests)
        self.pins.update(digests)

    def release(self, digests: str, is_pinned: bool = True) -> None:
        self.manager.release(digests, is_pinned)
        self.users.subtract(digests)
        self.pins.subtract(digests if is_pinned else "")

    def advance(self, wanted: str, max_copies: int = 100) -> bool:
        has_news = self.manager.advance(list(wanted), max_copies)
        self.manager.assert_consistent(self.pins, self.users)
        return has_news

    def bring(self, digests: str) -> None:
        """Load and copy, one after another, and use no more."""
        for digest in digests:
            self.use(digest)
            self.advance(digest)
            self.spawner.run_all()
            self.advance(digest)
            self.release(digest, is_pinned=False)

    @property
    def slots(self) -> str:
        return "".join(sorted(self.manager.slots.sizes))

    @property
    def host(self) -> str:
        return "".join(sorted(self.manager.host.sizes))


def test_states_from_absent_to_slot() -> None:
    """A wanted adapter is loading, then in host memory, then in a slot, then gone when forgotten."""
    room = Room()
    assert room.manager.states() == {}
    room.use("a")
    room.advance("a")
    assert room.manager.states() == {"a": "loading"}
    assert not room.manager.are_in_memory(("a",))
    room.spawner.run_all()
    assert room.advance("a", max_copies=0)
    assert room.manager.states() == {"a": "host"}
    assert room.manager.are_in_memory(("a",)) and not room.manager.are_in_slots(("a",))
    room.advance("a")
    assert room.manager.states() == {"a": "slot"}
    assert room.adapter_slots.slots[room.manager.slot("a")].digest == "a"
    room.release("a", is_pinned=False)
    room.manager.discard("a")
    assert room.manager.states() == {} and room.adapter_slots.slots == {}


def test_thundering_herd_loads_once() -> None:
    """However many sequences want an adapter, and however often, it is loaded once."""
    room = Room()
    for _ in range(50):
        room.use("a")
        room.advance("a")
    room.spawner.run_all()
    room.advance("a")
    assert room.loader.loaded == ["a"]
    assert room.manager.loads_total == 1


def test_least_recently_used_slot_is_evicted() -> None:
    """Room is made by taking the slot that was worn longest ago; its host copy stays as long as there is room."""
    room = Room()
    room.bring("abc")
    room.use("a")
    room.pin("a")
    room.release("a")
    room.bring("d")
    assert room.slots == "acd"
    assert room.host == "abcd"
    assert room.manager.evictions_total == 1


def test_pinned_slots_stay() -> None:
    """A slot that is worn is never evicted; who finds no room waits."""
    room = Room()
    room.bring("abc")
    room.use("abcd")
    room.pin("abc")
    room.advance("d")
    room.spawner.run_all()
    room.advance("d")
    assert room.slots == "abc"
    room.release("b")
    room.advance("d")
    assert room.slots == "acd"


def test_copies_are_bounded_by_bytes_but_one_always_goes() -> None:
    """Between two steps one copy is made however large, and more only within the bytes of a step."""
    room = Room(copy_bytes=5)
    room.use("ab")
    room.advance("ab")
    room.spawner.run_all()
    room.advance("ab")
    assert room.slots == "a"
    room.advance("ab")
    assert room.slots == "ab"


def test_earlier_wanted_beats_later_wanted() -> None:
    """Where slots are short, what the queue wants first takes them from what it wants later."""
    room = Room(slot_bytes=20)
    room.bring("cd")
    room.use("abcd")
    room.advance("abcd")
    room.spawner.run_all()
    room.advance("abcd")
    assert room.slots == "ab"
    room.advance("abcd")
    assert room.slots == "ab"


def test_unwanted_is_evicted_before_wanted() -> None:
    """Room is made of what nobody waits for, even where it was worn more recently."""
    room = Room()
    room.bring("abc")
    room.use("da")
    room.advance("da")
    room.spawner.run_all()
    room.advance("da", max_copies=1)
    assert room.slots == "acd"


def test_large_one_is_not_starved_by_small_ones() -> None:
    """Who waits for much room keeps those behind it from taking what becomes free."""
    room = Room()
    room.loader.sizes["L"] = 25
    room.bring("abc")
    room.use("abcLd")
    room.pin("abc")
    room.advance("Ld")
    room.spawner.run_all()
    room.release("a")
    room.advance("Ld")
    assert room.slots == "abc"
    room.release("b")
    room.release("c")
    room.advance("Ld")
    assert room.slots == "L"


def test_host_memory_is_evicted_by_use_and_never_exceeds_its_budget() -> None:
    """The host level keeps to its bytes; what is in a slot may lose its host copy."""
    room = Room(host_bytes=20)
    room.bring("abc")
    assert room.host == "bc"
    assert room.slots == "abc"


def test_host_copy_that_a_sequence_waits_for_is_kept_for_it() -> None:
    """A later load does not push out what is wanted earlier; it is dropped and loads again when there is room."""
    room = Room(slot_bytes=10, host_bytes=20)
    room.bring("p")
    room.use("pabc")
    room.pin("p")
    for _ in range(3):
        room.advance("abc")
        room.spawner.run_all()
    assert room.host == "ab"
    assert room.loader.loaded.count("c") == 1
    room.release("p")
    for _ in range(3):
        room.advance("abc")
        room.spawner.run_all()
    assert room.slots == "a"
    assert "c" in room.host


def test_number_of_loads_at_once_is_bounded() -> None:
    """Not more than max_loading artifacts are loaded at once, the first wanted first."""
    room = Room(max_loading=2)
    room.use("abcd")
    room.advance("abcd")
    assert room.manager.states() == {"a": "loading", "b": "loading"}
    room.spawner.run_all()
    room.advance("abcd", max_copies=0)
    assert room.manager.states() == {"a": "host", "b": "host", "c": "loading", "d": "loading"}


def test_failed_load_is_told_and_tried_again_later_each_time() -> None:
    """After a failure requests are refused until the back-off is over, which doubles; success starts it anew."""
    room = Room()
    room.loader.errors["a"] = ValueError("broken")
    for waited in (1.0, 2.0, 4.0):
        room.use("a")
        room.advance("a")
        room.spawner.run_all()
        assert room.advance("a")
        failure = room.manager.refusal(("a",))
        assert failure and failure.code == "adapter_failed"
        assert room.manager.states() == {"a": "failed"}
        room.release("a", is_pinned=False)
        room.clock.now += waited - 0.01
        assert room.manager.refusal(("a",)) == failure
        room.clock.now += 0.01
        assert room.manager.refusal(("a",)) is None
    assert room.manager.load_failures_total == 3
    del room.loader.errors["a"]
    room.bring("a")
    assert room.slots == "a"
    room.use("a")
    room.bring("bcde")
    assert "a" not in room.slots + room.host
    room.loader.errors["a"] = ValueError("broken again")
    room.bring("a")
    room.clock.now += 1.0
    assert room.manager.refusal(("a",)) is None


def test_adapter_larger_than_a_budget_is_refused_for_good() -> None:
    """One that could never be in a slot fails with `adapter_too_large`, and is not loaded again and again."""
    room = Room()
    room.loader.sizes["a"] = 31
    room.use("a")
    room.advance("a")
    room.spawner.run_all()
    room.advance("a")
    room.clock.now += 1e6
    failure = room.manager.refusal(("a",))
    assert failure and failure.code == "adapter_too_large"
    assert "31" in failure.message and "30" in failure.message
    assert room.host == room.slots == ""


def test_forgotten_while_used_stays_until_the_end() -> None:
    """A deleted artifact is dropped with its last user, unless it was uploaded again meanwhile."""
    room = Room()
    room.bring("ab")
    room.use("ab")
    room.pin("ab")
    room.manager.discard("a")
    room.manager.discard("b")
    room.manager.discard("never seen")
    assert room.slots == "ab"
    room.use("b")
    room.release("ab")
    assert room.slots == room.host == "b"
    room.release("b", is_pinned=False)
    assert room.slots == room.host == "b"


def test_forgotten_while_loading_is_not_kept() -> None:
    """What was deleted while it loaded leaves nothing, whether the load ends well or not."""
    for error in (None, ValueError("gone")):
        room = Room()
        if error:
            room.loader.errors["a"] = error
        room.use("a")
        room.advance("a")
        room.release("a", is_pinned=False)
        room.manager.discard("a")
        room.spawner.run_all()
        room.advance("")
        assert room.manager.states() == {}


def test_books_are_checked() -> None:
    """A pin without a sequence, and a sequence without a pin, are noticed."""
    room = Room()
    room.bring("a")
    room.manager.use("a")
    with pytest.raises(InvariantError, match="users"):
        room.manager.assert_consistent(Counter(), Counter())
    room.manager.slots.used += 1
    with pytest.raises(InvariantError, match="bytes"):
        room.manager.assert_consistent(Counter(), Counter("a"))


def test_loads_run_in_other_threads_and_wake_the_engine() -> None:
    """The load is not in the caller's thread, and `on_loaded` is called when it has ended."""
    seen: list[str] = []
    woken = threading.Event()

    def load(digest: str) -> FakePacked:
        seen.append(threading.current_thread().name)
        return FakePacked(digest, 10)

    budgets = Budgets(slot_bytes=10, host_bytes=10, copy_bytes_per_step=10)
    with ThreadSpawner(1, "loader") as spawner:
        manager: AdapterManager[FakePacked] = AdapterManager(FakeSlots(10), load, budgets, spawner, Clock(), woken.set)
        manager.use("a")
        manager.advance(["a"], 1)
        assert woken.wait(5)
        assert manager.advance(["a"], 1)
    assert manager.are_in_slots(("a",))
    assert seen[0].startswith("loader")


def test_kept_ones_are_brought_and_stay() -> None:
    """Kept adapters come into slots with nobody asking, stay while others come and go, and go when kept no more."""
    room = Room()
    room.manager.keep_resident("ab")
    room.advance("")
    room.spawner.run_all()
    room.advance("")
    assert room.slots == "ab"
    room.bring("cdefg")
    assert room.slots == "abg"
    room.manager.keep_resident("b")
    room.bring("hi")
    assert "b" in room.slots and "a" not in room.slots


def test_kept_ones_are_wanted_last() -> None:
    """What a sequence waits for comes before what is only kept."""
    room = Room(slot_bytes=10)
    room.manager.keep_resident("a")
    room.use("b")
    room.advance("b")
    room.spawner.run_all()
    room.advance("b")
    assert room.slots == "b"
    room.pin("b")
    room.advance("")
    assert room.slots == "b", "it is worn"
    room.release("b")
    room.release("b", is_pinned=False)
    room.users["b"] = room.pins["b"] = 0


def test_kept_ones_starve_nobody() -> None:
    """Where kept adapters fill the slots, what a sequence waits for still gets room: the last kept one goes for it."""
    room = Room()
    room.manager.keep_resident("abcd")
    for _ in range(3):
        room.advance("")
        room.spawner.run_all()
    assert room.slots == "abc"
    room.use("e")
    for _ in range(3):
        room.advance("e")
        room.spawner.run_all()
    assert room.slots == "abe"
    room.release("e", is_pinned=False)
    room.advance("")
    assert room.slots == "abc"


def test_repeated_failure_is_quarantined() -> None:
    """After the fifth failure in a row an adapter is quarantined: tried again much later, or when it is renewed."""
    room = Room()
    room.loader.errors["a"] = OSError(5, "Input/output error")
    for number in range(1, MAX_FAILURES + 1):
        assert room.manager.refusal(("a",)) is None
        room.bring("a")
        assert room.manager.states() == {"a": "quarantined" if number == MAX_FAILURES else "failed"}
        room.clock.now += 60
    assert room.manager.num_quarantined == 1 and len(room.loader.loaded) == MAX_FAILURES
    room.clock.now += QUARANTINE_S - 61
    assert room.manager.refusal(("a",))
    room.clock.now += 1
    assert room.manager.refusal(("a",)) is None
    room.bring("a")
    assert room.manager.states() == {"a": "quarantined"}
    del room.loader.errors["a"]
    room.manager.renew("a")
    assert room.manager.states() == {}
    room.bring("a")
    assert room.slots == "a" and room.manager.num_quarantined == 0


def test_corrupt_bytes_are_quarantined_at_once() -> None:
    """Bytes that are not those that were put there are tried again only when they are uploaded again."""
    room = Room()
    room.loader.errors["a"] = ArtifactCorruptError("its digest does not match")
    room.bring("a")
    room.clock.now += 1e9
    failure = room.manager.refusal(("a",))
    assert failure and failure.code == "artifact_corrupt" and "digest does not match" in failure.message
    assert room.manager.states() == {"a": "quarantined"}
    room.bring("b")
    assert room.slots == "b", "others are served"
    del room.loader.errors["a"]
    room.manager.renew("a")
    room.bring("a")
    assert room.slots == "ab"


def test_a_kept_one_that_fails_is_tried_again() -> None:
    """Nobody has to ask for it."""
    room = Room()
    room.loader.errors["a"] = OSError(5, "Input/output error")
    room.manager.keep_resident("a")
    room.advance("")
    room.spawner.run_all()
    room.advance("")
    assert room.manager.states() == {"a": "failed"}
    del room.loader.errors["a"]
    room.clock.now += 1
    room.advance("")
    room.spawner.run_all()
    room.advance("")
    assert room.slots == "a"
