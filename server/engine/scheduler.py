"""Which sequences compute how many tokens in the next step.

Continuous batching without phases: every running sequence has one remainder. A step takes first the running
sequences with a remainder of 1, so that decoding never starves, then chunks of the longer remainders and admits
waiting sequences while tokens, rows and blocks last. When blocks run out, a running sequence goes back to the front of
its namespace's queue and recomputes later (what it published may still be found).

Namespaces (tenants) share what is computed: a virtual token counter (VTC, Sheng et al. 2024) charges each for its
tokens, divided by its share; prompts go on and are admitted from the namespace with the least, in order of arrival
inside it. Nobody is held back while nobody else wants the step. While several namespaces are about, a step takes few
tokens of prompts, so that nobody waits long for another's to be done with; but all of a prompt of who was served least
and holds less of the rows and blocks than its share. Who is first in line, holds less than its share and finds no rows
or blocks takes them from who holds more.

A sequence whose adapters are not in slots is skipped, never waited for. A skipped one cannot starve: once
`max_bypass` others with hats were admitted while it lacked nothing but room in the slots, no other sequence with hats
is admitted before it. Running sequences end, so slots lose their pins, and its adapters are copied first.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Protocol

from server.engine.blocks import BlockPool
from server.engine.sequence import Sequence, State


class Adapters(Protocol):
    """What planning must know of adapters."""

    def are_in_slots(self, digests: tuple[str, ...]) -> bool:
        """Whether all of them can be worn now."""
        ...

    def are_in_memory(self, digests: tuple[str, ...]) -> bool:
        """Whether all of them are in host memory or in slots."""
        ...


PRESENCE_S = 30.0  # a namespace is about for so long after its last sequence
MAX_SHARED = 4  # of a step's tokens prompts get one in so many while several namespaces are about
MIN_QUEUED = 8  # a namespace that has less than one in so many of a full queue's places still gets one


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """A step has at most `max_batch_tokens` tokens and `max_running` rows; `max_waiting` sequences may queue.

    While several namespaces are about, a step has at most `max_shared_tokens` tokens of prompts, unless one is urgent.
    Of a step that computes others, probes of uploads take at most `max_probe_tokens`.
    """

    max_batch_tokens: int
    max_running: int
    max_waiting: int
    max_bypass: int = 64
    max_shared_tokens: int | None = None
    max_probe_tokens: int = 8

    def __post_init__(self) -> None:
        if not 0 < self.max_running <= self.max_batch_tokens:
            raise ValueError(
                f"max_running = {self.max_running} must be between 1 and max_batch_tokens = {self.max_batch_tokens}: "
                "every running sequence needs a token in each step"
            )

    def max_tokens(self, num_decodes: int, num_present: int, num_urgent: int) -> int:
        """Most tokens of a step with so many decoding sequences, namespaces about, and tokens of an urgent prompt."""
        if num_present < 2:
            return self.max_batch_tokens
        max_prompts = self.max_shared_tokens or max(1, self.max_batch_tokens // MAX_SHARED)
        return min(self.max_batch_tokens, num_decodes + max(max_prompts, num_urgent))


@dataclass
class StepPlan:
    """One step: (sequence, number of tokens) in rows; `admitted` run for the first time; `num_preempted` went back."""

    max_tokens: int
    rows: list[tuple[Sequence, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    num_preempted: int = 0
    num_tokens: int = 0
    num_probe_tokens: int = 0

    @property
    def is_full(self) -> bool:
        """Whether no token fits any more."""
        return self.num_tokens >= self.max_tokens


@dataclass
class TenantQueue:
    """One namespace's queue: those that were preempted come first, then in order of arrival."""

    preempted: deque[Sequence] = field(default_factory=deque)
    arrived: dict[str, Sequence] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.preempted) + len(self.arrived)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.preempted, self.arrived.values())

    def remove(self, sequence: Sequence) -> None:
        """Take one out."""
        if sequence.is_preempted:
            self.preempted.remove(sequence)
        else:
            del self.arrived[sequence.id]


class Scheduler:
    """Holds the sequences that wait and run, and plans steps over them."""

    def __init__(self, limits: StepLimits, pool: BlockPool) -> None:
        self.limits, self.pool = limits, pool
        self.running: list[Sequence] = []  # in order of admission
        self._queues: dict[str, TenantQueue] = {}  # of the namespaces that wait
        self._num_active: Counter[str] = Counter()  # sequences that wait or run, by namespace
        self._num_running: Counter[str] = Counter()
        self._shares: dict[str, float] = {}  # of the namespaces that are active
        self._last_active: dict[str, float] = {}  # when a namespace was active last
        self._probe_namespaces: set[str] = set()  # namespaces of probes, which are nobody's
        self._virtual_counters: dict[str, float] = {}  # tokens divided by the share, by namespace
        self._last: str | None = None  # the namespace that was admitted last
        self._num_with_adapters = 0  # sequences with hats that were admitted, ever
        self._bypassed: Sequence | None = None

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return sum(map(len, self._queues.values()))

    def is_full(self, namespace: str) -> bool:
        """Whether the queue takes no more of a namespace.

        Nobody can fill it for others: who has few in it is still let in, until twice as many wait as may.
        """
        num_waiting, max_waiting = self.num_waiting, self.limits.max_waiting
        if num_waiting < max_waiting or max_waiting < MIN_QUEUED:
            return num_waiting >= max_waiting
        return num_waiting >= 2 * max_waiting or len(self._queues.get(namespace, ())) >= max_waiting // MIN_QUEUED

    def virtual_counter(self, namespace: str) -> float:
        """How many tokens, divided by its share, the namespace counts as served.

        Who comes from nowhere starts a step's tokens below the least of those that wait: a short prompt is computed at
        once, and nobody saves up more.
        """
        return self._virtual_counters.get(namespace, 0)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        namespace = sequence.namespace
        if not self._is_backlogged(namespace):
            others = [self._virtual_counters[other] for other in self._num_active if self._is_backlogged(other)]
            least = min(others, default=self.virtual_counter(self._last or namespace))
            self._virtual_counters[namespace] = max(
                self.virtual_counter(namespace), least - self.limits.max_batch_tokens
            )
        self._num_active[namespace] += 1
        self._shares[namespace] = sequence.share
        if sequence.is_probe:
            self._probe_namespaces.add(namespace)
        else:
            self._last_active[namespace] = max(self._last_active.get(namespace, sequence.arrived), sequence.arrived)
        self._queues.setdefault(namespace, TenantQueue()).arrived[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        namespace = sequence.namespace
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
            self._num_running[namespace] -= 1
        else:
            self._unqueue(sequence)
        self.pool.free(sequence.table)
        sequence.state, sequence.is_preempted = State.FINISHED, False
        self._bypassed = None if self._bypassed is sequence else self._bypassed
        self._num_active[namespace] -= 1
        if not self._num_active[namespace]:
            self._retire(namespace)

    def waiting(self, is_charged: bool = False) -> Iterator[Sequence]:
        """The queue in the order of admission.

        The order follows what is charged meanwhile; with `is_charged` as if each one were served as it is passed.
        """
        return self._by_least_served(self._queues, is_charged)

    def wanted(self) -> list[str]:
        """Digests in the order in which slots should be given to them: the starving sequence's, then the queue's."""
        first = [] if self._bypassed is None else [self._bypassed]
        ahead = islice(self.waiting(is_charged=True), 2 * self.limits.max_running)
        return list(dict.fromkeys(digest for sequence in (*first, *ahead) for digest in sequence.digests))

    def plan(self, adapters: Adapters, now: float) -> StepPlan:
        """The next step."""
        num_preempted = self._preempt_for_fairness(adapters, now)
        num_decodes = sum(sequence.remainder == 1 for sequence in self.running)
        num_present, num_urgent = self._num_present(now), self._num_urgent(adapters, now)
        plan = StepPlan(self.limits.max_tokens(num_decodes, num_present, num_urgent), num_preempted=num_preempted)
        self._plan_decodes(plan)
        self._plan_prompts(plan, adapters, now)
        return plan

    def _by_least_served(
        self, queues: Mapping[str, Iterable[Sequence]], is_charged: bool = False
    ) -> Iterator[Sequence]:
        """The sequences of all namespaces, always the next of the one that counts least.

        Of equals the one with fewer sequences comes first.
        """
        passed = dict.fromkeys(queues, 0.0)
        heap = [
            (self._virtual_counters[namespace], self._num_active[namespace], index, namespace, iter(tuple(queue)))
            for index, (namespace, queue) in enumerate(queues.items())
        ]
        heapq.heapify(heap)
        while heap:
            *_, index, namespace, queue = heapq.heappop(heap)
            if (sequence := next(queue, None)) is not None:
                yield sequence
                passed[namespace] += sequence.remainder / self._shares[namespace] if is_charged else 0
                count = self._virtual_counters[namespace] + passed[namespace]
                heapq.heappush(heap, (count, self._num_active[namespace], index, namespace, queue))

    def _num_present(self, now: float) -> int:
        """How many namespaces have sequences, or had some a moment ago."""
        self._last_active.update(dict.fromkeys(self._num_active.keys() - self._probe_namespaces, now))
        for namespace in [name for name, seen in self._last_active.items() if now - seen > PRESENCE_S]:
            del self._last_active[namespace]
        return len(self._last_active)

    def _preempt_for_fairness(self, adapters: Adapters, now: float) -> int:
        """Who is first in line, below its share, and finds no row or blocks takes them from who is above its share.

        How many sequences went back for it. The decodes of this step may take a block each before it is admitted.
        """
        if len(self._num_active) < 2:
            return 0
        first = next((sequence for sequence in self.waiting() if self._may_start(sequence, adapters, now)), None)
        if first is None or first.is_probe or self._holding(first.namespace) >= self._share(first.namespace):
            return 0
        num_preempted = 0
        while self._cannot_fit(first) and (victim := self._over_share(first.namespace)) is not None:
            self._preempt(victim)
            num_preempted += 1
        return num_preempted

    def _num_urgent(self, adapters: Adapters, now: float) -> int:
        """Tokens to compute of the next prompt of who was served least, where that one holds less than its share.

        Who was served least may only decode: then all others' prompts have time.
        """
        active = self._num_active.keys() - self._probe_namespaces
        if len(active) < 2:
            return 0
        least = min(
            active, key=lambda namespace: (self._virtual_counters[namespace], self._num_active[namespace], namespace)
        )
        if self._holding(least) >= self._share(least):
            return 0
        begun = next(
            (sequence for sequence in self.running if sequence.namespace == least and sequence.remainder > 1), None
        )
        if begun is not None:
            return begun.remainder
        first = next(
            (sequence for sequence in self._queues.get(least, ()) if self._may_start(sequence, adapters, now)), None
        )
        if first is None or self._cannot_fit(first):
            return 0
        return first.remainder - self.pool.block_size * len(self.pool.lookup(first.table, first.tokens).full)

    def _cannot_fit(self, sequence: Sequence) -> bool:
        num_running = len(self.running)
        return num_running >= self.limits.max_running or not self.pool.has_room(
            sequence.table, sequence.tokens, num_spare=2 * num_running
        )

    def _share(self, namespace: str) -> float:
        return self._shares[namespace] / sum(self._shares[other] for other in self._num_active)

    def _holding(self, namespace: str, without: Sequence | None = None) -> float:
        """The part of all rows, or of all blocks, that a namespace holds, whichever is more."""
        its = [sequence for sequence in self.running if sequence.namespace == namespace and sequence is not without]
        num_blocks = sum(len(sequence.table.blocks) for sequence in its)
        return max(len(its) / self.limits.max_running, num_blocks / self.pool.num_blocks)

    def _over_share(self, beneficiary: str) -> Sequence | None:
        """The last admitted of the namespace that is furthest above its share, and stays no lower without it."""
        last = {sequence.namespace: sequence for sequence in self.running if sequence.namespace != beneficiary}
        largest = max(last, key=lambda namespace: self._holding(namespace) / self._shares[namespace], default=None)
        if largest is None or self._holding(largest, without=last[largest]) < self._share(largest):
            return None
        return last[largest]

    def _plan_decodes(self, plan: StepPlan) -> None:
        order = self._least_first()
        for sequence in tuple(order):
            if sequence.state is State.RUNNING and sequence.remainder == 1 and self._grow(plan, sequence, order):
                self._take(plan, sequence)

    def _least_first(self) -> list[Sequence]:
        """The running sequences in order of admission, but those of namespaces that hold most for their share last."""
        if len(self._num_active) < 2:
            return list(self.running)
        held = {namespace: self._holding(namespace) / self._shares[namespace] for namespace in self._num_active}
        return sorted(self.running, key=lambda sequence: held[sequence.namespace])

    def _grow(self, plan: StepPlan, sequence: Sequence, order: list[Sequence]) -> bool:
        """Room for one more position, if need be by preempting; False where the sequence itself had to go.

        The last in the order of planning goes first. It is never planned yet.
        """
        while not self.pool.extend(sequence.table, len(sequence.tokens)):
            victim = order.pop()
            self._preempt(victim)
            plan.num_preempted += 1
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._num_running[sequence.namespace] -= 1
        self.pool.free(sequence.table)
        sequence.state, sequence.is_preempted, sequence.num_computed = State.WAITING, True, 0
        self._queues.setdefault(sequence.namespace, TenantQueue()).preempted.appendleft(sequence)

    def _plan_prompts(self, plan: StepPlan, adapters: Adapters, now: float) -> None:
        """Prompts that are begun and those that wait, namespaces in turn."""
        begun = self._begun(plan)
        queues = {name: [*begun.get(name, ()), *self._queues.get(name, ())] for name in {**begun, **self._queues}}
        for sequence in self._by_least_served(queues):
            if plan.is_full:
                return
            if sequence.state is State.WAITING and not self._may_start(sequence, adapters, now):
                continue
            if sequence.state is State.WAITING and not self._admit(plan, sequence, now):
                break  # it keeps its place: nobody smaller passes it for ever
            self._take(plan, sequence)
        for sequence in self._by_least_served(self._begun(plan)):
            self._take(plan, sequence)

    def _begun(self, plan: StepPlan) -> dict[str, list[Sequence]]:
        """The running sequences that the step has not taken yet, by namespace."""
        planned = {sequence.id for sequence, _ in plan.rows}
        begun: dict[str, list[Sequence]] = {}
        for sequence in self.running:
            if sequence.id not in planned:
                begun.setdefault(sequence.namespace, []).append(sequence)
        return begun

    def _admit(self, plan: StepPlan, sequence: Sequence, now: float) -> bool:
        """Give it a row and blocks; False where there are none.

        One block is left to each running sequence: admission must not cause the next preemption.
        """
        if len(self.running) >= self.limits.max_running:
            return False
        num_cached = self.pool.allocate(sequence.table, sequence.tokens, num_spare=len(self.running))
        if num_cached is None:
            return False
        self._unqueue(sequence)
        self._last = sequence.namespace
        if not sequence.is_preempted:
            self._num_with_adapters += bool(sequence.digests)
            self._bypassed = None if self._bypassed is sequence else self._bypassed
            sequence.first_admitted = now
            sequence.num_cached = sequence.num_charged = num_cached
            plan.admitted.append(sequence)
        sequence.state, sequence.is_preempted, sequence.num_computed = State.RUNNING, False, num_cached
        self.running.append(sequence)
        self._num_running[sequence.namespace] += 1
        return True

    def _may_start(self, sequence: Sequence, adapters: Adapters, now: float) -> bool:
        max_running = sequence.max_running
        has_row = max_running is None or self._num_running[sequence.namespace] < max_running
        return has_row and self._has_its_adapters(sequence, adapters, now) and not self._is_prefix_coming(sequence)

    def _has_its_adapters(self, sequence: Sequence, adapters: Adapters, now: float) -> bool:
        if not sequence.digests or sequence.is_preempted:
            return True
        if not adapters.are_in_slots(sequence.digests):
            self._skip(sequence, adapters, now)
            return False
        if sequence.skipped_since is not None:
            sequence.load_seconds += now - sequence.skipped_since
            sequence.skipped_since = None
        return self._bypassed is None or self._bypassed is sequence

    def _is_prefix_coming(self, sequence: Sequence) -> bool:
        """Whether a running sequence computes the same prefix just now: soon it can be shared."""
        root, num_virtual = sequence.table.root, sequence.num_virtual
        return num_virtual > 0 and any(
            other.num_computed < num_virtual and other.table.root == root for other in self.running
        )

    def _skip(self, sequence: Sequence, adapters: Adapters, now: float) -> None:
        if sequence.skipped_since is None:
            sequence.skipped_since = now
        if sequence.skipped_at is None and adapters.are_in_memory(sequence.digests):
            sequence.skipped_at = self._num_with_adapters
        is_bypassed = sequence.skipped_at is not None and (
            self._num_with_adapters - sequence.skipped_at >= self.limits.max_bypass
        )
        if is_bypassed and self._bypassed is None:
            self._bypassed = sequence

    def _take(self, plan: StepPlan, sequence: Sequence) -> None:
        """Put as much of a remainder into the step as fits, and charge its namespace for what is new."""
        num_tokens = min(sequence.remainder, self._room(plan, sequence))
        if num_tokens <= 0:
            return
        plan.rows.append((sequence, num_tokens))
        plan.num_tokens += num_tokens
        plan.num_probe_tokens += num_tokens if sequence.is_probe else 0
        num_new = max(0, sequence.num_computed + num_tokens - sequence.num_charged)
        sequence.num_charged += num_new
        self._virtual_counters[sequence.namespace] += num_new / self._shares[sequence.namespace]

    def _room(self, plan: StepPlan, sequence: Sequence) -> int:
        """How many tokens a sequence may have of this step."""
        room = plan.max_tokens - plan.num_tokens
        if sequence.is_probe and not all(other.is_probe for other in self.running):
            room = min(room, self.limits.max_probe_tokens - plan.num_probe_tokens)
        return room

    def _unqueue(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.namespace]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.namespace]

    def _is_backlogged(self, namespace: str) -> bool:
        """Whether it waits for more than its next tokens: for rows, or for its prompts."""
        return namespace in self._queues or any(
            sequence.remainder > 1 for sequence in self.running if sequence.namespace == namespace
        )

    def _retire(self, namespace: str) -> None:
        """Keep what an idle namespace was served; forget those that would start no lower anyway."""
        del self._num_active[namespace], self._num_running[namespace], self._shares[namespace]
        self._probe_namespaces.discard(namespace)
        least = (
            min((self._virtual_counters[other] for other in self._num_active), default=0) - self.limits.max_batch_tokens
        )
        for other in [other for other in self._virtual_counters if other not in self._num_active]:
            if not self._num_active or self._virtual_counters[other] <= least:
                del self._virtual_counters[other]
