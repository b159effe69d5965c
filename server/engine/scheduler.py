"""Which sequences compute how many tokens in the next step.

Continuous batching without phases: every running sequence has one remainder. A step takes first the running
sequences with a remainder of 1, so that decoding never starves, then chunks of the longer remainders, then admits
waiting sequences while tokens, rows and blocks last. When blocks run out, the last admitted sequence goes back to the
front of the queue and recomputes later (what it published may still be found).

The queue is fair between namespaces: the one that was served the fewest tokens comes first, in order of arrival
inside it. A sequence whose adapters are not in slots is skipped, never waited for. A skipped one cannot starve: once
`max_bypass` others with hats were admitted while it lacked nothing but room in the slots, no other sequence with hats
is admitted before it. Running sequences end, so slots lose their pins, and its adapters are copied first.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
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


@dataclass(frozen=True, kw_only=True)
class Limits:
    """A step has at most `max_batch_tokens` tokens and `max_running` rows; `max_waiting` sequences may queue."""

    max_batch_tokens: int
    max_running: int
    max_waiting: int
    max_bypass: int = 64

    def __post_init__(self) -> None:
        if not 0 < self.max_running <= self.max_batch_tokens:
            raise ValueError(
                f"max_running = {self.max_running} must be between 1 and max_batch_tokens = {self.max_batch_tokens}: "
                "every running sequence needs a token in each step"
            )


@dataclass
class Plan:
    """One step: (sequence, number of tokens) in rows; `admitted` run for the first time; `num_preempted` went back."""

    rows: list[tuple[Sequence, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    num_preempted: int = 0
    num_tokens: int = 0


class Scheduler:
    """Holds the sequences that wait and run, and plans steps over them."""

    def __init__(self, limits: Limits, pool: BlockPool) -> None:
        self.limits, self.pool = limits, pool
        self.running: list[Sequence] = []  # in order of admission
        self._preempted: deque[Sequence] = deque()  # they come first, and keep their pins
        self._queues: dict[str, dict[str, Sequence]] = {}  # namespace -> id -> sequence, in order of arrival
        self._num_active: Counter[str] = Counter()  # sequences that wait or run, by namespace
        self._served: dict[str, int] = {}  # tokens, by namespace
        self._num_dressed = 0  # sequences with hats that were admitted, ever
        self._starving: Sequence | None = None

    @property
    def num_waiting(self) -> int:
        """Sequences in the queue, preempted ones included."""
        return len(self._preempted) + sum(map(len, self._queues.values()))

    @property
    def is_full(self) -> bool:
        """Whether the queue takes no more."""
        return self.num_waiting >= self.limits.max_waiting

    def served(self, namespace: str) -> int:
        """How many tokens the namespace counts as served; newcomers start at the least of those that are active."""
        return self._served.get(namespace, 0)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        namespace = sequence.namespace
        if not self._num_active[namespace]:  # so that nobody saves up credit by being idle
            self._served[namespace] = max(self.served(namespace), self._least_served())
        self._num_active[namespace] += 1
        self._queues.setdefault(namespace, {})[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and free its blocks."""
        if sequence.state is State.RUNNING:
            self.running.remove(sequence)
        elif sequence.is_preempted:
            self._preempted.remove(sequence)
        else:
            self._unqueue(sequence)
        self.pool.free(sequence.table)
        sequence.state = State.FINISHED
        self._starving = None if self._starving is sequence else self._starving
        self._num_active[sequence.namespace] -= 1
        if not self._num_active[sequence.namespace]:
            self._retire(sequence.namespace)

    def waiting(self, is_charged: bool = False) -> Iterator[Sequence]:
        """The queue in the order of admission.

        The order follows what is charged meanwhile; with `is_charged` as if each one were served as it is passed.
        """
        yield from tuple(self._preempted)
        served = dict(self._served)
        heap = [
            (self._served[namespace], index, namespace, iter(tuple(queue.values())))
            for index, (namespace, queue) in enumerate(self._queues.items())
        ]
        heapq.heapify(heap)
        while heap:
            _, index, namespace, queue = heapq.heappop(heap)
            if (sequence := next(queue, None)) is not None:
                yield sequence
                served[namespace] += sequence.remainder
                count = served[namespace] if is_charged else self._served[namespace]
                heapq.heappush(heap, (count, index, namespace, queue))

    def wanted(self) -> list[str]:
        """Digests in the order in which slots should be given to them: the starving sequence's, then the queue's."""
        first = [] if self._starving is None else [self._starving]
        ahead = islice(self.waiting(is_charged=True), 2 * self.limits.max_running)
        return list(dict.fromkeys(digest for sequence in (*first, *ahead) for digest in sequence.digests))

    def plan(self, adapters: Adapters, now: float) -> Plan:
        """The next step."""
        plan = Plan()
        self._plan_decodes(plan)
        for sequence in self.running:
            if sequence.remainder > 1:
                self._take(plan, sequence)
        self._admit(plan, adapters, now)
        return plan

    def _plan_decodes(self, plan: Plan) -> None:
        for sequence in tuple(self.running):
            if sequence.state is State.RUNNING and sequence.remainder == 1 and self._grow(plan, sequence):
                self._take(plan, sequence)

    def _grow(self, plan: Plan, sequence: Sequence) -> bool:
        """Room for one more position, if need be by preempting; False where the sequence itself had to go.

        The last admitted goes first. It is never planned yet: those before it in `running` are planned before it.
        """
        while not self.pool.extend(sequence.table, len(sequence.tokens)):
            victim = self.running.pop()
            self.pool.free(victim.table)
            victim.state, victim.is_preempted, victim.num_computed = State.WAITING, True, 0
            self._preempted.appendleft(victim)
            plan.num_preempted += 1
            if victim is sequence:
                return False
        return True

    def _admit(self, plan: Plan, adapters: Adapters, now: float) -> None:
        limits = self.limits
        for sequence in self.waiting():
            if plan.num_tokens >= limits.max_batch_tokens or len(self.running) >= limits.max_running:
                return
            if not self._can_wear(sequence, adapters, now) or self._is_prefix_coming(sequence):
                continue
            # one block is left to each running sequence: admission must not cause the next preemption
            num_cached = self.pool.allocate(sequence.table, sequence.tokens, num_spare=len(self.running))
            if num_cached is None:
                return  # it keeps its place: nobody smaller passes it for ever
            self._start(plan, sequence, num_cached, now)
            self._take(plan, sequence)

    def _start(self, plan: Plan, sequence: Sequence, num_cached: int, now: float) -> None:
        if sequence.is_preempted:
            self._preempted.remove(sequence)
        else:
            self._unqueue(sequence)
            self._num_dressed += bool(sequence.digests)
            self._starving = None if self._starving is sequence else self._starving
            sequence.first_admitted = now
            sequence.num_cached = sequence.num_charged = num_cached
            plan.admitted.append(sequence)
        sequence.state, sequence.is_preempted, sequence.num_computed = State.RUNNING, False, num_cached
        self.running.append(sequence)

    def _can_wear(self, sequence: Sequence, adapters: Adapters, now: float) -> bool:
        if not sequence.digests or sequence.is_preempted:
            return True
        if not adapters.are_in_slots(sequence.digests):
            self._skip(sequence, adapters, now)
            return False
        if sequence.skipped_since is not None:
            sequence.load_seconds += now - sequence.skipped_since
            sequence.skipped_since = None
        return self._starving is None or self._starving is sequence

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
            sequence.skipped_at = self._num_dressed
        is_bypassed = sequence.skipped_at is not None and (
            self._num_dressed - sequence.skipped_at >= self.limits.max_bypass
        )
        if is_bypassed and self._starving is None:
            self._starving = sequence

    def _take(self, plan: Plan, sequence: Sequence) -> None:
        """Put as much of a remainder into the step as fits, and charge its namespace for what is new."""
        num_tokens = min(sequence.remainder, self.limits.max_batch_tokens - plan.num_tokens)
        if num_tokens <= 0:
            return
        plan.rows.append((sequence, num_tokens))
        plan.num_tokens += num_tokens
        num_new = max(0, sequence.num_computed + num_tokens - sequence.num_charged)
        sequence.num_charged += num_new
        self._served[sequence.namespace] += num_new

    def _unqueue(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.namespace]
        del queue[sequence.id]
        if not queue:
            del self._queues[sequence.namespace]

    def _least_served(self) -> int:
        return min((self._served[namespace] for namespace, count in self._num_active.items() if count), default=0)

    def _retire(self, namespace: str) -> None:
        """Keep what an idle namespace owes; forget those that would start at the least served anyway."""
        del self._num_active[namespace]
        least = self._least_served()
        for other in [other for other in self._served if other not in self._num_active]:
            if not self._num_active or self._served[other] <= least:
                del self._served[other]
