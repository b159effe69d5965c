import threading
from collections import Counter

import pytest

from server.engine.adapters.manager import AdapterManager, Budgets
from server.engine.blocks import InvariantError
from server.model.fake import FakePacked, FakeSlots
from tests.server.engine.spawners import LateSpawner, ThreadSpawner
from tests.server.engine.world import Clock, FakeLoader


class Room:
    """A manager over fakes: 3 slots and 4 places in host memory for adapters of 10 bytes."""

    def __init__(
        self, slot_bytes: int = 30, host_bytes: int = 40, copy_bytes: int = 1000, max_loading: int = 8
    ) -> None:
        self.adapter_slots, self.loader, self.spawner, self.clock = (
            FakeSlots(slot_bytes),
            FakeLoader(),
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
    """A wanted adapter is loading, then in host memory, then in a slot, then gone when it is discarded."""
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
    """The slot that was used longest ago is evicted; its host copy stays as long as there is room."""
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
    """A slot in use is never evicted; a sequence that finds no room waits."""
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
    """Adapters that the queue wants first take slots from those that it wants later, if slots are short."""
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
    """Adapters that no sequence waits for are evicted first, even if they were used more recently."""
    room = Room()
    room.bring("abc")
    room.use("da")
    room.advance("da")
    room.spawner.run_all()
    room.advance("da", max_copies=1)
    assert room.slots == "acd"


def test_large_one_is_not_starved_by_small_ones() -> None:
    """A large adapter that waits for room keeps those behind it from taking what becomes free."""
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
    """Artifacts are loaded at most max_loading at once, the first wanted first."""
    room = Room(max_loading=2)
    room.use("abcd")
    room.advance("abcd")
    assert room.manager.states() == {"a": "loading", "b": "loading"}
    room.spawner.run_all()
    room.advance("abcd", max_copies=0)
    assert room.manager.states() == {"a": "host", "b": "host", "c": "loading", "d": "loading"}


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


def test_discarded_while_loading_is_not_kept() -> None:
    """An adapter that was deleted while it loaded leaves nothing, whether the load ends well or not."""
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


def test_bookkeeping_is_checked() -> None:
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


def test_resident_adapters_are_loaded_and_stay() -> None:
    """Resident adapters come into slots unasked, stay while others come and go, and go when no longer resident."""
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


def test_resident_adapters_are_wanted_last() -> None:
    """Adapters that a sequence waits for come before those that are only resident."""
    room = Room(slot_bytes=10)
    room.manager.keep_resident("a")
    room.use("b")
    room.advance("b")
    room.spawner.run_all()
    room.advance("b")
    assert room.slots == "b"
    room.pin("b")
    room.advance("")
    assert room.slots == "b", "it is in use"
    room.release("b")
    room.release("b", is_pinned=False)
    room.users["b"] = room.pins["b"] = 0


def test_resident_adapters_starve_none() -> None:
    """A sequence still gets room if resident adapters fill the slots: the least important of them goes for it."""
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
