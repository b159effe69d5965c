"""Adapters whose loads fail: the back-off, the quarantine, and what ends both."""

import pytest

from adapters_store.errors import AbsentError, ArtifactCorruptError, StoreDownError
from server.engine.adapters.entry import MAX_FAILURES, MAX_OUTAGE_RETRY_S, QUARANTINE_S
from tests.server.engine.adapters.test_manager import Room


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
    """An adapter that can never be in a slot fails with `adapter_too_large`, and is not loaded again and again."""
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


def test_a_store_that_is_away_quarantines_nothing() -> None:
    """However long the store does not answer, loads are tried again every few seconds, and their failure says so."""
    room = Room()
    room.loader.errors["a"] = StoreDownError("the store of artifacts does not answer in time")
    for _ in range(3 * MAX_FAILURES):
        room.bring("a")
        failure = room.manager.refusal(("a",))
        assert failure and failure.code == "store_unavailable" and "upload" not in failure.message
        assert room.manager.states() == {"a": "failed"}
        room.clock.now += MAX_OUTAGE_RETRY_S
        assert room.manager.refusal(("a",)) is None
    del room.loader.errors["a"]
    room.bring("a")
    assert room.slots == "a"


def idle(room: Room, num_steps: int) -> None:
    """Let steps go by in which no sequence asks for anything."""
    for _ in range(num_steps):
        room.advance("")
        room.spawner.run_all()
        room.advance("")


@pytest.mark.parametrize("state", ["absent", "loading", "slot", "failed"])
def test_what_was_deleted_is_not_loaded_again(state: str) -> None:
    """An adapter that is deleted is not resident any more: in whatever state it was, it is not loaded for ever."""
    room = Room()
    if state == "failed":
        room.loader.errors["a"] = AbsentError("no artifact")
    room.manager.keep_resident("a")
    if state == "loading":
        room.advance("")
    elif state != "absent":
        idle(room, 1)
    room.loader.errors["a"] = AbsentError("no artifact")
    room.manager.discard("a")
    idle(room, 5)
    assert len(room.loader.loaded) <= 1 and room.manager.states() == {}


def test_a_deleted_adapter_that_comes_back_is_resident() -> None:
    """An adapter that was deleted while it was used, and uploaded and pinned again, stays when that use has ended."""
    room = Room()
    room.bring("a")
    room.use("a")
    room.manager.discard("a")
    room.manager.keep_resident("a")
    room.release("a", is_pinned=False)
    idle(room, 3)
    assert room.slots == "a" and len(room.loader.loaded) == 1


def test_a_resident_adapter_that_fails_is_tried_again() -> None:
    """A resident adapter whose load failed is tried again without a sequence that asks for it."""
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
