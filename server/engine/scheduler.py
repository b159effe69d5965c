"""The scheduler: choose which sequences compute how many tokens in the next step.

Continuous batching without phases: every running sequence has one remainder, the tokens that have no KV yet. A step
takes first the running sequences that decode, whose remainder is the token sampled last and those that had to follow it
by the answer's form, so that decoding never starves, then chunks of the longer remainders, and admits waiting sequences
while tokens, rows and blocks last. When blocks run out, a running sequence is preempted: it goes back to the front of
its namespace's queue and is recomputed later (the blocks that it published may still be found).

Namespaces (tenants) are served fairly, as `server.engine.fairness` counts: prompts continue and are admitted from the
namespace that was served least, in order of arrival inside it. No namespace is held back while no other has work. While
several are present, a step takes few tokens of prompts, so that none waits long for another's; except for a prompt of
the namespace that was served least and is below its share, which is taken whole. If the first waiting sequence belongs
to a namespace below its share and finds no row or blocks, sequences of namespaces above theirs are preempted.

A sequence whose adapters are not in slots, whose form is not compiled, or whose beginning a running one is computing,
is skipped, never waited for. One that is skipped for its adapters cannot starve: once `max_bypass` others with adapters
were admitted while it lacked nothing but room in the slots, no other sequence with adapters is admitted before it.
Running sequences end, so slots lose their pins, and its adapters are copied first.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Protocol

from server.engine.blocks import BlockPool
from server.engine.fairness import TenantFairness
from server.engine.sequence import Sequence, State


class Adapters(Protocol):
    """Tells where adapters are; `server.engine.adapters.manager.AdapterManager` does."""

    def are_in_slots(self, digests: tuple[str, ...]) -> bool:
        """Whether all of them are in slots, so that a step can use them."""
        ...

    def are_in_memory(self, digests: tuple[str, ...]) -> bool:
        """Whether all of them are in host memory or in slots."""
        ...


MAX_SHARED = 4  # prompts get one in so many of a step's tokens while several namespaces are present
MIN_QUEUED = 8  # a namespace that has less than one in so many of a full queue's places still gets one


@dataclass(frozen=True, kw_only=True)
class StepLimits:
    """Limits of a step: at most `max_batch_tokens` tokens and `max_running` rows; `max_waiting` sequences may queue.

    At most `max_scored_tokens` of prompts are scored, for each has logits as large as the vocabulary.

    While several namespaces are present, a step has at most `max_shared_tokens` tokens of prompts (None: one in
    `MAX_SHARED` of `max_batch_tokens`), unless a prompt is urgent. Of a step that computes other sequences, probes of
    uploads take at most `max_probe_tokens`. A sequence with adapters is bypassed at most `max_bypass` times.
    """

    max_batch_tokens: int
    max_running: int
    max_waiting: int
    max_bypass: int = 64
    max_shared_tokens: int | None = None
    max_probe_tokens: int = 8
    max_scored_tokens: int = 128

    def __post_init__(self) -> None:
        if not 0 < self.max_running <= self.max_batch_tokens:
            raise ValueError(
                f"max_running = {self.max_running} must be between 1 and max_batch_tokens = {self.max_batch_tokens}: "
                "every running sequence needs a token in each step"
            )

    def max_tokens(self, num_decodes: int, num_present: int, num_urgent: int) -> int:
        """Return the token budget of a step.

        Sequences that decode have `num_decodes` tokens, `num_present` namespaces are present, and the urgent prompt has
        `num_urgent` tokens to compute (0: none is urgent).
        """
        if num_present < 2:
            return self.max_batch_tokens
        max_prompts = self.max_shared_tokens or max(1, self.max_batch_tokens // MAX_SHARED)
        return min(self.max_batch_tokens, num_decodes + max(max_prompts, num_urgent))


@dataclass
class StepPlan:
    """The work of one step: its `rows` are (sequence, number of tokens to compute).

    `admitted` sequences run for the first time; `num_preempted` sequences went back to their queues.
    """

    max_tokens: int
    rows: list[tuple[Sequence, int]] = field(default_factory=list)
    admitted: list[Sequence] = field(default_factory=list)
    num_preempted: int = 0
    num_tokens: int = 0
    num_probe_tokens: int = 0
    num_scored_tokens: int = 0

    @property
    def is_full(self) -> bool:
        """Whether the token budget is used up."""
        return self.num_tokens >= self.max_tokens


@dataclass
class TenantQueue:
    """Waiting sequences of one namespace: those that were preempted come first, then the others in order of arrival."""

    preempted: deque[Sequence] = field(default_factory=deque)
    arrived: dict[str, Sequence] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.preempted) + len(self.arrived)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self.preempted, self.arrived.values())

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue."""
        if sequence.is_preempted:
            self.preempted.remove(sequence)
        else:
            del self.arrived[sequence.id]


class Scheduler:
    """Holds the waiting and running sequences, and plans steps over them."""

    def __init__(self, limits: StepLimits, pool: BlockPool) -> None:
        self.limits, self.pool = limits, pool
        self.running: list[Sequence] = []  # in order of admission
        self.fairness = TenantFairness(limits.max_running, pool.num_blocks, max_credit=limits.max_batch_tokens)
        self._queues: dict[str, TenantQueue] = {}  # of the namespaces that have waiting sequences
        self._num_running: Counter[str] = Counter()  # by namespace
        self._num_with_adapters = 0  # sequences with adapters that were admitted, ever
        self._bypassed: Sequence | None = None  # was bypassed `max_bypass` times: no other with adapters goes first

    @property
    def num_waiting(self) -> int:
        """The number of sequences in all queues, preempted ones included."""
        return sum(map(len, self._queues.values()))

    def is_full(self, namespace: str) -> bool:
        """Whether no more sequences of a namespace may queue.

        No namespace can fill the queue for others: one that has few sequences in it may still add some, until twice
        `max_waiting` wait.
        """
        num_waiting, max_waiting = self.num_waiting, self.limits.max_waiting
        if num_waiting < max_waiting or max_waiting < MIN_QUEUED:
            return num_waiting >= max_waiting
        return num_waiting >= 2 * max_waiting or len(self._queues.get(namespace, ())) >= max_waiting // MIN_QUEUED

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        self.fairness.add(sequence, self._is_backlogged)
        self._queues.setdefault(sequence.namespace, TenantQueue()).arrived[sequence.id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, whether it waits or runs, and free its blocks."""
        if sequence.state is State.RUNNING:
            self._stop(sequence)
        else:
            self._unqueue(sequence)
        self.pool.free(sequence.table)
        sequence.state, sequence.is_preempted = State.FINISHED, False
        self._bypassed = None if self._bypassed is sequence else self._bypassed
        self.fairness.remove(sequence.namespace)

    def waiting(self, is_charged: bool = False) -> Iterator[Sequence]:
        """Yield the waiting sequences in the order of admission.

        Charges made during the iteration count; with `is_charged`, every sequence that was yielded counts as served.
        """
        return self.fairness.by_least_served(self._queues, is_charged)

    def wanted(self) -> list[str]:
        """List digests in the order in which they should get slots: the bypassed sequence's, then the queue's."""
        first = [] if self._bypassed is None else [self._bypassed]
        ahead = islice(self.waiting(is_charged=True), 2 * self.limits.max_running)
        return list(dict.fromkeys(digest for sequence in (*first, *ahead) for digest in sequence.digests))

    def next_forms(self) -> list[Sequence]:
        """List waiting sequences whose forms are to be compiled, as far ahead as adapters are wanted."""
        ahead = islice(self.waiting(is_charged=True), 2 * self.limits.max_running)
        return [sequence for sequence in ahead if sequence.is_form_due]

    def plan(self, adapters: Adapters, now: float) -> StepPlan:
        """Plan the next step at `now` (monotonic seconds): preempt, admit, and choose the tokens of each row.

        The caller must compute the plan's rows and advance their sequences before it plans again.
        """
        num_preempted = self._preempt_for_fairness(adapters, now)
        num_decodes = sum(sequence.remainder for sequence in self.running if sequence.is_decode)
        num_present, num_urgent = self.fairness.num_present(now), self._num_urgent(adapters, now)
        plan = StepPlan(self.limits.max_tokens(num_decodes, num_present, num_urgent), num_preempted=num_preempted)
        self._plan_decodes(plan)
        self._plan_prompts(plan, adapters, now)
        return plan

    def _preempt_for_fairness(self, adapters: Adapters, now: float) -> int:
        """Preempt namespaces above their share if the first waiting sequence's is below its own and finds no room.

        Returns the number preempted. The room that is made counts a spare block for each running sequence, which may
        take one in this step before the waiting one is admitted.
        """
        if not self.fairness.is_contended:
            return 0
        first = next((sequence for sequence in self.waiting() if self._may_start(sequence, adapters, now)), None)
        if first is None or first.is_probe or not self.fairness.is_below_share(first.namespace, self.running):
            return 0
        num_preempted = 0
        while self._cannot_fit(first) and (victim := self.fairness.over_share(first.namespace, self.running)):
            self._preempt(victim)
            num_preempted += 1
        return num_preempted

    def _num_urgent(self, adapters: Adapters, now: float) -> int:
        """Return the tokens to compute of the least served namespace's next prompt, if it is below its share; else 0.

        That is 0 also if the namespace only decodes: then all others' prompts have time.
        """
        least = self.fairness.least_served()
        if least is None or not self.fairness.is_below_share(least, self.running):
            return 0
        begun = next(
            (sequence for sequence in self.running if sequence.namespace == least and not sequence.is_decode), None
        )
        if begun is not None:
            return begun.remainder
        first = next(
            (sequence for sequence in self._queues.get(least, ()) if self._may_start(sequence, adapters, now)), None
        )
        if first is None or self._cannot_fit(first):
            return 0
        return first.remainder - self.pool.lookup(first.table, first.tokens).num_positions

    def _cannot_fit(self, sequence: Sequence) -> bool:
        num_running = len(self.running)
        return num_running >= self.limits.max_running or not self.pool.has_room(
            sequence.table, sequence.tokens, num_spare=2 * num_running
        )

    def _plan_decodes(self, plan: StepPlan) -> None:
        """Take the sequences that decode, so that the step has a token at least for each."""
        order = self.fairness.least_holding_first(self.running)
        decodes = [sequence for sequence in order if sequence.is_decode]
        for num_left, sequence in zip(reversed(range(len(decodes))), decodes, strict=True):
            if sequence.state is State.RUNNING and self._grow(plan, sequence, order):
                self._take(plan, sequence, num_left)

    def _grow(self, plan: StepPlan, sequence: Sequence, order: list[Sequence]) -> bool:
        """Make room for one more position, preempting if need be; False if the sequence itself was preempted.

        The last sequence in the order of planning is preempted first: it is never in the plan yet.
        """
        while not self.pool.extend(sequence.table, len(sequence.tokens)):
            victim = order.pop()
            self._preempt(victim)
            plan.num_preempted += 1
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        self.pool.free(sequence.table)
        sequence.state, sequence.is_preempted, sequence.num_computed = State.WAITING, True, 0
        self._queues.setdefault(sequence.namespace, TenantQueue()).preempted.appendleft(sequence)

    def _plan_prompts(self, plan: StepPlan, adapters: Adapters, now: float) -> None:
        """Take prompts that are begun and admit waiting ones, from the least served namespace each time."""
        begun = self._begun(plan)
        queues = {name: [*begun.get(name, ()), *self._queues.get(name, ())] for name in {**begun, **self._queues}}
        for sequence in self.fairness.by_least_served(queues):
            if plan.is_full:
                return
            if sequence.state is State.WAITING and not self._may_start(sequence, adapters, now):
                continue
            if sequence.state is State.WAITING and not self._admit(plan, sequence, now):
                break  # it keeps its place, or smaller ones could pass it for ever
            self._take(plan, sequence)
        for sequence in self.fairness.by_least_served(self._begun(plan)):
            self._take(plan, sequence)

    def _begun(self, plan: StepPlan) -> dict[str, list[Sequence]]:
        """Group the running sequences that the step has not taken yet by namespace."""
        planned = {sequence.id for sequence, _ in plan.rows}
        begun: dict[str, list[Sequence]] = {}
        for sequence in self.running:
            if sequence.id not in planned:
                begun.setdefault(sequence.namespace, []).append(sequence)
        return begun

    def _admit(self, plan: StepPlan, sequence: Sequence, now: float) -> bool:
        """Give a waiting sequence a row and blocks; False if there is no room.

        One block is left free for each running sequence: admission must not cause the next preemption.
        """
        if len(self.running) >= self.limits.max_running:
            return False
        num_cached = self.pool.allocate(sequence.table, sequence.tokens, num_spare=len(self.running))
        if num_cached is None:
            return False
        self._unqueue(sequence)
        self.fairness.note_admission(sequence.namespace)
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
        return (
            has_row
            and not sequence.is_form_due
            and self._has_its_adapters(sequence, adapters, now)
            and not self._is_beginning_coming(sequence)
        )

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

    def _is_beginning_coming(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing what this one begins with, which can then be shared."""
        table, tokens, is_coming = sequence.table, sequence.tokens, self.pool.is_coming
        return any(is_coming(table, tokens, other.table, other.tokens) for other in self.running if not other.is_decode)

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

    def _take(self, plan: StepPlan, sequence: Sequence, num_kept: int = 0) -> None:
        """Put what fits of a remainder beside `num_kept` other tokens into the step, and charge what is uncharged."""
        num_tokens = min(sequence.remainder, self._room(plan, sequence) - num_kept)
        if num_tokens <= 0:
            return
        plan.rows.append((sequence, num_tokens))
        plan.num_tokens += num_tokens
        plan.num_probe_tokens += num_tokens if sequence.is_probe else 0
        plan.num_scored_tokens += sequence.num_targets(num_tokens)
        num_new = max(0, sequence.num_computed + num_tokens - sequence.num_charged)
        sequence.num_charged += num_new
        self.fairness.charge(sequence.namespace, num_new)

    def _room(self, plan: StepPlan, sequence: Sequence) -> int:
        """Return how many more tokens of this step a sequence may take."""
        room = plan.max_tokens - plan.num_tokens
        if sequence.is_probe and not all(other.is_probe for other in self.running):
            room = min(room, self.limits.max_probe_tokens - plan.num_probe_tokens)
        num_left = self.limits.max_scored_tokens - plan.num_scored_tokens
        if sequence.num_targets(min(sequence.remainder, room)) > num_left:
            return sequence.scoring_at - sequence.num_computed + num_left
        return room

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._num_running[sequence.namespace] -= 1
        if not self._num_running[sequence.namespace]:
            del self._num_running[sequence.namespace]

    def _unqueue(self, sequence: Sequence) -> None:
        queue = self._queues[sequence.namespace]
        queue.remove(sequence)
        if not queue:
            del self._queues[sequence.namespace]

    def _is_backlogged(self, namespace: str) -> bool:
        """Whether a namespace waits for rows or for its prompts, not only for the next tokens of running sequences."""
        return namespace in self._queues or any(
            not sequence.is_decode for sequence in self.running if sequence.namespace == namespace
        )
