"""The adapter manager: moves adapters from the store to host memory and into slots (absent -> loading -> host -> slot).

Threads load artifacts into host memory; copies into slots are made between steps, in `advance`, bounded by bytes per
step. Both tiers are LRU under byte budgets at true sizes. A slot that a running sequence uses is pinned and stays. If
room is short, what is wanted earlier beats what is wanted later, so that the first in line always proceeds. Resident
adapters (those of pinned tasks) are always wanted, last of all, and are evicted only for one that would not fit beside
them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Generic, Protocol, TypeVar

from server.core import EngineFailure
from server.engine.adapters.entry import CORRUPT, OUTAGE, AdapterEntry
from server.engine.adapters.failures import failure_message
from server.engine.adapters.load_queue import LoadQueue, LoadResult, P, SizedAdapter, Spawner
from server.engine.adapters.memory_tier import MemoryTier
from server.engine.blocks import InvariantError

log = logging.getLogger(__name__)

P_contra = TypeVar("P_contra", bound=SizedAdapter, contravariant=True)


class SlotStore(Protocol[P_contra]):
    """The adapter slots of one base on one device; `server.model.slots.slots.AdapterSlots` is one."""

    def insert(self, packed: P_contra) -> int:
        """Copy a packed adapter into a free slot and return its number; between steps only."""
        ...

    def drop(self, slot: int) -> None:
        """Free a slot by its number; between steps only."""
        ...


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Budgets in bytes of slots, host memory and copies; at most `max_loading` artifacts load at once."""

    slot_bytes: int
    host_bytes: int
    copy_bytes_per_step: int
    max_loading: int = 2


class AdapterManager(Generic[P]):
    """Moves adapters between the store, host memory and slots. All methods belong to the engine's thread.

    `load` (digest -> packed adapter) runs in the spawner's threads, and `on_loaded` is called there after each load, so
    that an idle engine wakes. `clock` gives monotonic seconds. For each sequence, `use` is called when it is queued,
    `pin` when it first runs, and `release` when it ends.
    """

    def __init__(
        self,
        adapter_slots: SlotStore[P],
        load: Callable[[str], P],
        budgets: Budgets,
        spawner: Spawner,
        clock: Callable[[], float],
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self.budgets = budgets
        self.host, self.slots = MemoryTier(budgets.host_bytes), MemoryTier(budgets.slot_bytes)
        self.loads_total = self.load_failures_total = self.evictions_total = 0
        self.load_seconds_total = 0.0
        self._adapter_slots, self._clock = adapter_slots, clock
        self._load_queue = LoadQueue(load, spawner, clock, on_loaded)
        self._entries: dict[str, AdapterEntry[P]] = {}
        self._resident: dict[str, None] = {}  # most important first

    @property
    def num_quarantined(self) -> int:
        """The number of adapters whose loads failed too often or whose bytes are corrupt."""
        return sum(entry.is_quarantined for entry in self._entries.values())

    @property
    def num_pins(self) -> int:
        """The number of pins of all digests together."""
        return sum(entry.num_pins for entry in self._entries.values())

    def states(self) -> dict[str, str]:
        """Return the state of each digest: `loading`, `host`, `slot`, `failed` or `quarantined`; no absent ones."""
        return {digest: state for digest, entry in self._entries.items() if (state := entry.state)}

    def are_in_slots(self, digests: tuple[str, ...]) -> bool:
        """Whether all of them are in slots, so that a step can use them."""
        return all(digest in self.slots.sizes for digest in digests)

    def are_in_memory(self, digests: tuple[str, ...]) -> bool:
        """Whether all of them are in host memory or in slots."""
        return all(digest in self.slots.sizes or digest in self.host.sizes for digest in digests)

    def slot(self, digest: str) -> int:
        """Return the slot of a digest. Raises `InvariantError` if it has none."""
        slot = self._entries[digest].slot
        if slot is None:
            raise InvariantError(f"adapter {digest[:12]} is used and has no slot")
        return slot

    def refusal(self, digests: tuple[str, ...]) -> EngineFailure | None:
        """Say why a sequence cannot use these adapters, or None if it can.

        A load failed and its back-off lasts, or together they are larger than the slots.
        """
        entries = [self._entries[digest] for digest in digests if digest in self._entries]
        for entry in entries:
            if entry.is_failed(self._clock()):
                return entry.failure
        num_bytes = sum(entry.num_bytes or 0 for entry in entries)
        if num_bytes > self.budgets.slot_bytes:
            return self._too_large("the adapters of this request", num_bytes, self.budgets.slot_bytes)
        return None

    def use(self, digests: Iterable[str]) -> None:
        """Count a sequence that is queued as a user of these."""
        for digest in digests:
            entry = self._entries.setdefault(digest, AdapterEntry())
            entry.num_users += 1
            entry.is_discarded = False

    def pin(self, digests: Iterable[str]) -> None:
        """Keep these in their slots from now on: a sequence that uses them runs."""
        for digest in digests:
            self._entries[digest].num_pins += 1
            self.slots.touch(digest)
            self.host.touch(digest)

    def release(self, digests: Iterable[str], is_pinned: bool) -> None:
        """Undo the `use` of a sequence that has ended, and its `pin` if it had run (`is_pinned`)."""
        for digest in digests:
            entry = self._entries[digest]
            entry.num_users -= 1
            entry.num_pins -= is_pinned
            if not entry.num_users and entry.is_discarded:
                self._drop(digest)
            self._prune(digest)

    def discard(self, digest: str) -> None:
        """Drop a deleted artifact, at once or when the last sequence that uses it ends; it is resident no more."""
        self._resident.pop(digest, None)
        entry = self._entries.get(digest)
        if entry is None:
            return
        entry.is_discarded = True
        entry.clear_failures()
        if not entry.num_users:
            self._drop(digest)
            self._prune(digest)

    def keep_resident(self, digests: Iterable[str]) -> None:
        """Keep these in slots even if no sequence uses them, the most important first; replaces the previous list."""
        before, self._resident = self._resident, dict.fromkeys(digests)
        for digest in self._resident:
            self._entries.setdefault(digest, AdapterEntry()).is_discarded = False
        for digest in before:
            self._prune(digest)

    def renew(self, digest: str) -> None:
        """Forget the load failures of an artifact that was uploaded again: its next load may start at once."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.clear_failures()
            self._prune(digest)

    def advance(self, wanted: list[str], max_copies: int) -> bool:
        """Take in what was loaded, copy into slots and start loads, in the order of `wanted`; between steps only.

        At most `max_copies` copies are made, the first of them whatever its size. Returns True if a load ended or a
        copy failed: then `refusal` may answer differently for waiting sequences.
        """
        wanted = list(dict.fromkeys([*wanted, *self._resident]))
        order = {digest: place for place, digest in enumerate(wanted)}
        results = list(self._load_queue.results())
        for result in results:
            self._take_in(result, order)
        has_failed = self._copy(wanted, order, max_copies)
        self._start_loads(wanted, order)
        return bool(results) or has_failed

    def assert_consistent(self, pins: Counter[str], users: Counter[str]) -> None:
        """Raise `InvariantError` unless entries and tiers agree with the pins and users of all sequences, by digest."""
        for digest, entry in self._entries.items():
            if entry.num_pins != pins[digest] or entry.num_users != users[digest]:
                raise InvariantError(
                    f"adapter {digest[:12]} has {entry.num_pins} pins, {entry.num_users} users too many"
                )
            if entry.num_pins and entry.slot is None:
                raise InvariantError(f"adapter {digest[:12]} is pinned and not in a slot")
        in_slots = {digest for digest, entry in self._entries.items() if entry.slot is not None}
        in_host = {digest for digest, entry in self._entries.items() if entry.packed is not None}
        if in_slots != set(self.slots.sizes) or in_host != set(self.host.sizes):
            raise InvariantError("the adapters' entries and the memory tiers disagree")
        for tier in (self.host, self.slots):
            if tier.used != sum(tier.sizes.values()) or tier.used > tier.max_bytes:
                raise InvariantError(f"{tier.used} bytes of adapters are counted, at most {tier.max_bytes} may be")

    def _take_in(self, result: LoadResult[P], order: Mapping[str, int]) -> None:
        digest, entry = result.digest, self._entries[result.digest]
        entry.is_loading = False
        self.load_seconds_total += result.seconds
        max_bytes = min(self.budgets.slot_bytes, self.budgets.host_bytes)
        if entry.is_discarded and not entry.num_users:
            log.info("an adapter was deleted while it loaded", extra={"digest": digest})
        elif result.packed is None:
            code = getattr(result.error, "code", "")
            code = code if code in (CORRUPT, OUTAGE) else "adapter_failed"
            self._fail(digest, EngineFailure(code, failure_message(digest, result.error)))
        elif result.packed.num_bytes > max_bytes:
            failure = self._too_large(f"adapter {digest[:12]}", result.packed.num_bytes, max_bytes)
            self._fail(digest, failure, is_final=True)
        else:
            self.loads_total += 1
            entry.clear_failures()
            entry.num_bytes = result.packed.num_bytes
            self._hold_in_host(digest, result.packed, order)
        self._prune(digest)

    def _hold_in_host(self, digest: str, packed: P, order: Mapping[str, int]) -> None:
        """Keep a loaded adapter if there is room, else drop it: with its size known it loads again only for room."""
        if self._make_host_room(digest, packed.num_bytes, order):
            self._entries[digest].packed = packed
            self.host.add(digest, packed.num_bytes)

    def _make_host_room(self, digest: str, num_bytes: float, order: Mapping[str, int]) -> bool:
        victims = self._host_victims(digest, num_bytes, order)
        for victim in victims or ():
            self._evict_from_host(victim)
        return victims is not None

    def _host_victims(self, digest: str, num_bytes: float, order: Mapping[str, int]) -> list[str] | None:
        """List the host copies to evict for a digest, or None if that is not enough.

        The copies of adapters that are in slots may always go.
        """
        place, is_spared = order.get(digest, inf), self._spare(self.host, num_bytes)
        return self.host.victims(
            num_bytes,
            order,
            lambda other: self._entries[other].slot is None and (is_spared(other) or order.get(other, inf) < place),
        )

    def _spare(self, tier: MemoryTier, num_bytes: float) -> Callable[[str], bool]:
        """Return a test for the resident adapters, which are spared unless `num_bytes` do not fit beside them all."""
        resident = {other: tier.sizes[other] for other in self._resident if other in tier.sizes}
        has_room = num_bytes + sum(resident.values()) <= tier.max_bytes
        return resident.__contains__ if has_room else lambda _other: False

    def _start_loads(self, wanted: list[str], order: Mapping[str, int]) -> None:
        """Start loads in order, up to `max_loading`, only of what will find room in host memory by the sizes known."""
        reserved = sum(entry.num_bytes or 0 for entry in self._entries.values() if entry.is_loading)
        for digest in wanted:
            entry = self._entries[digest]
            if entry.is_failed(self._clock()) or entry.state is not None:
                continue
            num_bytes = reserved + (entry.num_bytes or 1)
            is_hopeless = self._host_victims(digest, num_bytes, order) is None
            if is_hopeless or self._load_queue.num_running >= self.budgets.max_loading:
                return
            reserved = num_bytes
            entry.is_loading = True
            self._load_queue.start(digest)

    def _copy(self, wanted: list[str], order: Mapping[str, int], max_copies: int) -> bool:
        """Copy into slots in order, until copies, the step's bytes or room are used up; True if a copy failed."""
        num_copies, num_bytes, has_failed = 0, 0, False
        for place, digest in enumerate(wanted):
            packed = self._entries[digest].packed
            if digest in self.slots.sizes or packed is None:
                continue
            num_bytes += packed.num_bytes
            if num_copies >= max_copies or (num_copies and num_bytes > self.budgets.copy_bytes_per_step):
                break
            if not self._make_slot_room(packed.num_bytes, order, place):
                break  # what is wanted later must not take the room that this one waits for
            num_copies += 1
            has_failed |= not self._copy_into_slot(digest, packed)
        return has_failed

    def _make_slot_room(self, num_bytes: int, order: Mapping[str, int], place: int) -> bool:
        is_spared = self._spare(self.slots, num_bytes)
        victims = self.slots.victims(
            num_bytes,
            order,
            lambda other: bool(self._entries[other].num_pins) or is_spared(other) or order.get(other, inf) < place,
        )
        for victim in victims or ():
            self.evictions_total += 1
            self._clear_slot(victim)
            self._prune(victim)
        return victims is not None

    def _copy_into_slot(self, digest: str, packed: P) -> bool:
        try:
            slot = self._adapter_slots.insert(packed)
        except Exception as error:  # noqa: BLE001 - a device without memory must not end the engine
            self._fail(digest, EngineFailure("adapter_failed", failure_message(digest, error)))
            return False
        self._entries[digest].slot = slot
        self.slots.add(digest, packed.num_bytes)
        return True

    def _fail(self, digest: str, failure: EngineFailure, is_final: bool = False) -> None:
        """Note and log a failed load or copy; `is_final` says that trying again cannot help."""
        entry = self._entries[digest]
        self.load_failures_total += 1
        entry.fail(failure, self._clock(), is_final)
        message = "adapter quarantined" if entry.is_quarantined else "adapter failed"
        log.warning(message, extra={"digest": digest, "reason": failure.message, "num_failures": entry.num_failures})

    @staticmethod
    def _too_large(what: str, num_bytes: int, max_bytes: int) -> EngineFailure:
        message = (
            f"{what} takes {num_bytes} bytes and at most {max_bytes} fit; raise the byte budgets for slots and host"
        )
        return EngineFailure("adapter_too_large", message)

    def _evict_from_host(self, digest: str) -> None:
        self.evictions_total += 1
        self._clear_host(digest)
        self._prune(digest)

    def _drop(self, digest: str) -> None:
        if digest in self.host.sizes:
            self._clear_host(digest)
        if digest in self.slots.sizes:
            self._clear_slot(digest)

    def _clear_host(self, digest: str) -> None:
        self.host.pop(digest)
        self._entries[digest].packed = None

    def _clear_slot(self, digest: str) -> None:
        entry = self._entries[digest]
        if entry.slot is not None:
            self._adapter_slots.drop(entry.slot)
        self.slots.pop(digest)
        entry.slot = None

    def _prune(self, digest: str) -> None:
        """Forget a digest without state, users and counted failures, unless it is resident."""
        entry = self._entries[digest]
        has_state = entry.state is not None or entry.num_failures > 0
        if not entry.num_users and not has_state and digest not in self._resident:
            del self._entries[digest]
