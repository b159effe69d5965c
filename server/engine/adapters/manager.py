"""Where every adapter is: absent -> loading -> host -> slot, or failed, or quarantined.

Threads load artifacts into host memory; the copy into a slot happens between steps, in `advance`, bounded by bytes per
step. Both levels are LRU under byte budgets at true sizes. A slot that a sequence wears is pinned and stays. Where
room is short, what is wanted earlier beats what is wanted later: so the first in line always gets on. Kept adapters
(pinned tasks') are wanted last of all, always, and go only where what somebody waits for would not fit beside them.

A load that fails is tried again later each time; after `MAX_FAILURES` in a row, and at once where the stored bytes are
not those that were put there, the adapter is quarantined.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import inf
from typing import Generic, Protocol, TypeVar

from server.core import EngineFailure
from server.engine.adapters.load_queue import LoadQueue, LoadResult, P, SizedAdapter, Spawner, sentence
from server.engine.adapters.memory_tier import MemoryTier
from server.engine.blocks import InvariantError

log = logging.getLogger(__name__)

FIRST_RETRY_S, MAX_RETRY_S = 1.0, 60.0
MAX_FAILURES = 5  # in a row
QUARANTINE_S = 600.0  # a store that was away may be back by then; corrupt bytes wait to be uploaded again
CORRUPT = "artifact_corrupt"

P_contra = TypeVar("P_contra", bound=SizedAdapter, contravariant=True)


class SlotStore(Protocol[P_contra]):
    """The slots of one base on one device (`server.model.slots.slots`)."""

    def insert(self, packed: P_contra) -> int:
        """Copy into a free slot and return its number; between steps only."""
        ...

    def drop(self, slot: int) -> None:
        """Free a slot; between steps only."""
        ...


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Bytes; `max_loading` artifacts load at once."""

    slot_bytes: int
    host_bytes: int
    copy_bytes_per_step: int
    max_loading: int = 2


@dataclass
class AdapterEntry(Generic[P]):
    """What is known of one digest. `num_users` are sequences from submit to finish, `num_pins` those that run."""

    num_users: int = 0
    num_pins: int = 0
    packed: P | None = None
    slot: int | None = None
    num_bytes: int | None = None
    is_loading: bool = False
    is_discarded: bool = False
    failure: EngineFailure | None = None
    num_failures: int = 0
    is_quarantined: bool = False
    retry_at: float = 0.0

    @property
    def state(self) -> str | None:
        """The most that is true of it; None is absent."""
        states = {
            "slot": self.slot is not None,
            "host": self.packed is not None,
            "loading": self.is_loading,
            "quarantined": self.is_quarantined,
            "failed": self.failure is not None,
        }
        return next((state for state, is_so in states.items() if is_so), None)


class AdapterManager(Generic[P]):
    """Moves adapters between the store, host memory and slots; only `load` runs in other threads.

    `load` turns a digest into a packed patch; `on_loaded` is called from its thread so that an idle engine wakes.
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
        self._resident: dict[str, None] = {}  # in the order in which they get room

    @property
    def num_quarantined(self) -> int:
        """Adapters whose loads failed too often, or whose bytes are corrupt."""
        return sum(entry.is_quarantined for entry in self._entries.values())

    @property
    def num_pins(self) -> int:
        """Pins of all digests together."""
        return sum(entry.num_pins for entry in self._entries.values())

    def states(self) -> dict[str, str]:
        """Where each known digest is: `loading`, `host`, `slot`, `failed` or `quarantined`."""
        return {digest: state for digest, entry in self._entries.items() if (state := entry.state)}

    def are_in_slots(self, digests: tuple[str, ...]) -> bool:
        """Whether all of them can be worn now."""
        return all(digest in self.slots.sizes for digest in digests)

    def are_in_memory(self, digests: tuple[str, ...]) -> bool:
        """Whether all of them are in host memory or in slots."""
        return all(digest in self.slots.sizes or digest in self.host.sizes for digest in digests)

    def slot(self, digest: str) -> int:
        """The slot of a digest that is in one."""
        slot = self._entries[digest].slot
        if slot is None:
            raise InvariantError(f"adapter {digest[:12]} is worn and has no slot")
        return slot

    def refusal(self, digests: tuple[str, ...]) -> EngineFailure | None:
        """Why a sequence cannot wear these: a load failed and its back-off lasts, or they do not fit together."""
        entries = [self._entries[digest] for digest in digests if digest in self._entries]
        for entry in entries:
            if self._is_failed(entry):
                return entry.failure
        num_bytes = sum(entry.num_bytes or 0 for entry in entries)
        if num_bytes > self.budgets.slot_bytes:
            return self._too_large("the adapters of this request", num_bytes, self.budgets.slot_bytes)
        return None

    def use(self, digests: Iterable[str]) -> None:
        """A sequence will wear these."""
        for digest in digests:
            entry = self._entries.setdefault(digest, AdapterEntry())
            entry.num_users += 1
            entry.is_discarded = False

    def pin(self, digests: Iterable[str]) -> None:
        """A sequence wears these from now on: they stay in their slots."""
        for digest in digests:
            self._entries[digest].num_pins += 1
            self.slots.touch(digest)
            self.host.touch(digest)

    def release(self, digests: Iterable[str], is_pinned: bool) -> None:
        """A sequence has ended: undo its `use`, and its `pin` where it came so far."""
        for digest in digests:
            entry = self._entries[digest]
            entry.num_users -= 1
            entry.num_pins -= is_pinned
            if not entry.num_users and entry.is_discarded:
                self._drop(digest)
            self._prune(digest)

    def discard(self, digest: str) -> None:
        """The artifact was deleted: keep nothing of it once nothing uses it."""
        entry = self._entries.get(digest)
        if entry is None:
            return
        entry.is_discarded = True
        self._absolve(entry)
        if not entry.num_users:
            self._drop(digest)
            self._prune(digest)

    def keep_resident(self, digests: Iterable[str]) -> None:
        """Keep these in slots while nobody asks for them, too, the first before the others; no others are kept."""
        before, self._resident = self._resident, dict.fromkeys(digests)
        for digest in self._resident:
            self._entries.setdefault(digest, AdapterEntry())
        for digest in before:
            self._prune(digest)

    def renew(self, digest: str) -> None:
        """The artifact was uploaded again: what failed before may be tried again at once."""
        entry = self._entries.get(digest)
        if entry is not None:
            self._absolve(entry)
            self._prune(digest)

    def advance(self, wanted: list[str], max_copies: int) -> bool:
        """Between two steps: take in what was loaded, start loads, copy into slots, all in the order of `wanted`.

        At most `max_copies` copies are made, one of them whatever its size. True where a load ended, well or not: then
        what `refusal` says of waiting sequences may have changed.
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
        """Raise `InvariantError` unless the books agree with the digests that sequences wear and use now."""
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
            raise InvariantError("the adapters' entries and the levels disagree")
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
            code = CORRUPT if getattr(result.error, "code", "") == CORRUPT else "adapter_failed"
            self._fail(digest, EngineFailure(code, sentence(digest, result.error)))
        elif result.packed.num_bytes > max_bytes:
            failure = self._too_large(f"adapter {digest[:12]}", result.packed.num_bytes, max_bytes)
            self._fail(digest, failure, is_final=True)
        else:
            self.loads_total += 1
            self._absolve(entry)
            entry.num_bytes = result.packed.num_bytes
            self._hold_in_host(digest, result.packed, order)
        self._prune(digest)

    def _hold_in_host(self, digest: str, packed: P, order: Mapping[str, int]) -> None:
        """Without room it is dropped: its size is known now, so that it loads again only when there is room."""
        if self._make_host_room(digest, packed.num_bytes, order):
            self._entries[digest].packed = packed
            self.host.add(digest, packed.num_bytes)

    def _make_host_room(self, digest: str, num_bytes: float, order: Mapping[str, int]) -> bool:
        victims = self._host_victims(digest, num_bytes, order)
        for victim in victims or ():
            self._evict_from_host(victim)
        return victims is not None

    def _host_victims(self, digest: str, num_bytes: float, order: Mapping[str, int]) -> list[str] | None:
        """Who is in a slot does not need its place here."""
        place, is_spared = order.get(digest, inf), self._spare(self.host, num_bytes)
        return self.host.victims(
            num_bytes,
            order,
            lambda other: self._entries[other].slot is None and (is_spared(other) or order.get(other, inf) < place),
        )

    def _spare(self, tier: MemoryTier, num_bytes: float) -> Callable[[str], bool]:
        """Whether one is kept; nobody is, where `num_bytes` would not fit beside all that are."""
        kept = {other: tier.sizes[other] for other in self._resident if other in tier.sizes}
        return kept.__contains__ if num_bytes + sum(kept.values()) <= tier.max_bytes else lambda _other: False

    def _start_loads(self, wanted: list[str], order: Mapping[str, int]) -> None:
        """In order, up to `max_loading`, and only what will find room in host memory as far as its size is known."""
        reserved = sum(entry.num_bytes or 0 for entry in self._entries.values() if entry.is_loading)
        for digest in wanted:
            entry = self._entries[digest]
            if self._is_failed(entry) or entry.state is not None:
                continue
            num_bytes = reserved + (entry.num_bytes or 1)
            is_hopeless = self._host_victims(digest, num_bytes, order) is None
            if is_hopeless or self._load_queue.num_running >= self.budgets.max_loading:
                return
            reserved = num_bytes
            entry.is_loading = True
            self._load_queue.start(digest)

    def _copy(self, wanted: list[str], order: Mapping[str, int], max_copies: int) -> bool:
        """Copy into slots, in order, until rows, bytes or room end; True where a copy failed."""
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
            self._fail(digest, EngineFailure("adapter_failed", sentence(digest, error)))
            return False
        self._entries[digest].slot = slot
        self.slots.add(digest, packed.num_bytes)
        return True

    def _fail(self, digest: str, failure: EngineFailure, is_final: bool = False) -> None:
        """Until its back-off is over nobody tries again; what is too large stays so."""
        entry = self._entries[digest]
        self.load_failures_total += 1
        entry.failure = failure
        entry.num_failures += 1
        entry.is_quarantined = failure.code == CORRUPT or (not is_final and entry.num_failures >= MAX_FAILURES)
        wait = min(FIRST_RETRY_S * 2 ** (entry.num_failures - 1), MAX_RETRY_S)
        wait = QUARANTINE_S if entry.is_quarantined else wait
        entry.retry_at = inf if is_final or failure.code == CORRUPT else self._clock() + wait
        what = "adapter quarantined" if entry.is_quarantined else "adapter failed"
        log.warning(what, extra={"digest": digest, "reason": failure.message, "num_failures": entry.num_failures})

    def _is_failed(self, entry: AdapterEntry[P]) -> bool:
        """Whether its last load failed and its back-off lasts."""
        if entry.failure is not None and self._clock() >= entry.retry_at:
            entry.failure, entry.is_quarantined = None, False  # one more try; how often it failed is not forgotten
        return entry.failure is not None

    @staticmethod
    def _absolve(entry: AdapterEntry[P]) -> None:
        entry.failure, entry.num_failures, entry.is_quarantined = None, 0, False

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
        """Forget what nothing is known of and nobody uses; what failed is known as long as that counts."""
        entry = self._entries[digest]
        is_known = entry.state is not None or entry.num_failures > 0
        if not entry.num_users and not is_known and digest not in self._resident:
            del self._entries[digest]
