"""Fairness between namespaces (tenants): a virtual token counter (VTC, Sheng et al. 2024) and shares of the capacity.

Each namespace is charged for the tokens that are computed for it, divided by its share; the one with the lowest counter
is served first. A namespace that comes back from idleness starts at most a step's tokens below the lowest counter of
those that wait: its short prompt is computed at once, and idle time earns no credit. Beside the counters, a namespace's
holding, the fraction of all rows or of all KV blocks that it occupies, is compared with its fraction of all shares: the
scheduler preempts a namespace above its share for one below.

Bookkeeping only: no clock, no threads, no tensors. The probes of uploads belong to no tenant; their namespaces never
count as present and are never the least served.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from server.engine.sequence import Sequence

PRESENCE_S = 30.0  # a namespace counts as present for so long after its last sequence


class TenantFairness:
    """Counts what each namespace was served, and compares what it holds with its share.

    `max_running` rows and `num_blocks` KV blocks are the capacity that is shared; `max_credit` is the number of tokens
    by which a returning namespace may start below the others. `running` arguments are the running sequences in order
    of admission.
    """

    def __init__(self, max_running: int, num_blocks: int, max_credit: int) -> None:
        self.max_running, self.num_blocks, self.max_credit = max_running, num_blocks, max_credit
        self._num_active: Counter[str] = Counter()  # sequences that wait or run, by namespace
        self._shares: dict[str, float] = {}  # of the active namespaces
        self._counters: dict[str, float] = {}  # tokens served, divided by the share; idle namespaces included
        self._last_active: dict[str, float] = {}  # seconds
        self._probe_namespaces: set[str] = set()
        self._last_admitted: str | None = None

    @property
    def is_contended(self) -> bool:
        """Whether at least two namespaces have sequences."""
        return len(self._num_active) >= 2

    def virtual_counter(self, namespace: str) -> float:
        """Return the tokens that a namespace was charged for, divided by its share; 0 if it is not known."""
        return self._counters.get(namespace, 0)

    def add(self, sequence: Sequence, is_backlogged: Callable[[str], bool]) -> None:
        """Count a new sequence, and lift its namespace's counter if the namespace comes back from idleness.

        `is_backlogged` tells whether a namespace waits for more than the next tokens of its running sequences.
        """
        namespace = sequence.namespace
        if not is_backlogged(namespace):
            others = [self._counters[other] for other in self._num_active if is_backlogged(other)]
            least = min(others, default=self.virtual_counter(self._last_admitted or namespace))
            self._counters[namespace] = max(self.virtual_counter(namespace), least - self.max_credit)
        self._num_active[namespace] += 1
        self._shares[namespace] = sequence.share
        if sequence.is_probe:
            self._probe_namespaces.add(namespace)
        else:
            self._last_active[namespace] = max(self._last_active.get(namespace, sequence.arrived), sequence.arrived)

    def remove(self, namespace: str) -> None:
        """Count one sequence less.

        An idle namespace keeps its counter as long as that could make a difference when it comes back.
        """
        self._num_active[namespace] -= 1
        if self._num_active[namespace]:
            return
        del self._num_active[namespace], self._shares[namespace]
        self._probe_namespaces.discard(namespace)
        least = min((self._counters[other] for other in self._num_active), default=0) - self.max_credit
        for other in [other for other in self._counters if other not in self._num_active]:
            if not self._num_active or self._counters[other] <= least:
                del self._counters[other]

    def note_admission(self, namespace: str) -> None:
        """Remember the namespace that was admitted last: with nobody waiting, its counter is where others start."""
        self._last_admitted = namespace

    def charge(self, namespace: str, num_tokens: int) -> None:
        """Charge an active namespace for tokens that a step computes for it."""
        self._counters[namespace] += num_tokens / self._shares[namespace]

    def by_least_served(self, queues: Mapping[str, Iterable[Sequence]], is_charged: bool = False) -> Iterator[Sequence]:
        """Yield the sequences of all queues, always the next of the namespace with the lowest counter.

        On equal counters the namespace with fewer sequences comes first. Charges made during the iteration count; with
        `is_charged`, every sequence that was yielded counts as if its remainder had been charged.
        """
        passed = dict.fromkeys(queues, 0.0)
        heap = [
            (self._counters[namespace], self._num_active[namespace], index, namespace, iter(tuple(queue)))
            for index, (namespace, queue) in enumerate(queues.items())
        ]
        heapq.heapify(heap)
        while heap:
            *_, index, namespace, queue = heapq.heappop(heap)
            if (sequence := next(queue, None)) is not None:
                yield sequence
                passed[namespace] += sequence.remainder / self._shares[namespace] if is_charged else 0
                count = self._counters[namespace] + passed[namespace]
                heapq.heappush(heap, (count, self._num_active[namespace], index, namespace, queue))

    def num_present(self, now: float) -> int:
        """Return how many namespaces have sequences at `now` (seconds) or had some in the last `PRESENCE_S`."""
        self._last_active.update(dict.fromkeys(self._num_active.keys() - self._probe_namespaces, now))
        for namespace in [name for name, seen in self._last_active.items() if now - seen > PRESENCE_S]:
            del self._last_active[namespace]
        return len(self._last_active)

    def least_served(self) -> str | None:
        """Return the active namespace with the lowest counter; None if fewer than two are active."""
        active = self._num_active.keys() - self._probe_namespaces
        if len(active) < 2:
            return None
        return min(active, key=lambda namespace: (self._counters[namespace], self._num_active[namespace], namespace))

    def is_below_share(self, namespace: str, running: list[Sequence]) -> bool:
        """Whether an active namespace holds less of the capacity than its fraction of all shares."""
        return self._holding(namespace, running) < self._share(namespace)

    def over_share(self, beneficiary: str, running: list[Sequence]) -> Sequence | None:
        """Pick the sequence to preempt for a namespace; None if no other one is above its share.

        It is the last admitted of the namespace that is furthest above its share and is not below it afterwards.
        """
        last = {sequence.namespace: sequence for sequence in running if sequence.namespace != beneficiary}
        largest = max(
            last, key=lambda namespace: self._holding(namespace, running) / self._shares[namespace], default=None
        )
        if largest is None or self._holding(largest, running, without=last[largest]) < self._share(largest):
            return None
        return last[largest]

    def least_holding_first(self, running: list[Sequence]) -> list[Sequence]:
        """Sort the running sequences by what their namespaces hold for their shares, then by order of admission."""
        if not self.is_contended:
            return list(running)
        held = {
            namespace: self._holding(namespace, running) / self._shares[namespace] for namespace in self._num_active
        }
        return sorted(running, key=lambda sequence: held[sequence.namespace])

    def _share(self, namespace: str) -> float:
        return self._shares[namespace] / sum(self._shares[other] for other in self._num_active)

    def _holding(self, namespace: str, running: list[Sequence], without: Sequence | None = None) -> float:
        """Return the fraction of all rows or of all KV blocks that a namespace occupies, the larger of the two."""
        its = [sequence for sequence in running if sequence.namespace == namespace and sequence is not without]
        num_blocks = sum(len(sequence.table.blocks) for sequence in its)
        return max(len(its) / self.max_running, num_blocks / self.num_blocks)
