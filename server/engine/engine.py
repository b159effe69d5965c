"""The engine: takes sequences, and computes their tokens in steps of three parts: schedule -> run -> commit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from copy import copy
from typing import Generic

from adapters_store.form import FormError
from server.core import EngineFailure, Row, Runner, Sampled, Timing
from server.engine.adapters.load_queue import P, Spawner
from server.engine.adapters.manager import AdapterManager, Budgets, SlotStore
from server.engine.blocks import BlockPool
from server.engine.forms import MAX_FAST_FORWARD, FormCompiler
from server.engine.messages import EngineConfig, Output, Stats, StepDone, Submit
from server.engine.scheduler import Scheduler, StepLimits, StepPlan
from server.engine.sequence import Sequence

log = logging.getLogger(__name__)

Result = Sampled | EngineFailure | None  # of a row; None if no token was wanted

NO_STALL_S = 2e-3  # taking in a load and evicting for it computes for 0.5 ms; planning takes 0.1 ms
INTERNAL = EngineFailure("internal", "the engine failed on this request; its log says why")


class Engine(Generic[P]):
    """Runs sequences over one runner and its adapter slots. All methods belong to one thread; `load` runs in others.

    `load` (digest -> packed adapter) runs in the spawner's threads, and `on_loaded` is called there after each load.
    `staged` is shared with `load`: the folders (by digest) of artifacts that are not in the store yet. `clock` gives
    monotonic seconds; `thread_clock` those without run-queue delay (`server.engine.thread_clock`), by default `clock`.
    `forms` compiles what answers must fit; None refuses every such sequence.

    A sequence ends in `_finish` and nowhere else: by a finish, a failure, its deadline or an abort.
    """

    def __init__(
        self,
        runner: Runner,
        adapter_slots: SlotStore[P],
        load: Callable[[str], P],
        config: EngineConfig,
        *,
        eos_token_ids: list[int],
        spawner: Spawner,
        clock: Callable[[], float],
        on_loaded: Callable[[], None] = lambda: None,
        staged: dict[str, str] | None = None,
        thread_clock: Callable[[], float] | None = None,
        forms: FormCompiler[Sequence] | None = None,
    ) -> None:
        self.runner, self._staged = runner, {} if staged is None else staged
        self.pool = BlockPool(runner.num_blocks, runner.block_size, config.is_prefix_cached)
        max_tokens = runner.num_blocks * runner.block_size
        self.max_sequence_tokens = min(max_tokens, config.runner.max_sequence_tokens or max_tokens)
        limits = StepLimits(
            max_batch_tokens=config.max_batch_tokens,
            max_running=config.max_running,
            max_waiting=config.max_waiting,
        )
        self.scheduler = Scheduler(limits, self.pool)
        budgets = Budgets(
            slot_bytes=config.slot_bytes,
            host_bytes=config.host_bytes,
            copy_bytes_per_step=config.copy_bytes_per_step,
            max_loading=config.num_loaders,
        )
        self.adapters = AdapterManager(adapter_slots, load, budgets, spawner, clock, on_loaded)
        self.sequences: dict[str, Sequence] = {}
        self._forms, self._formless = forms, dict[str, Sequence]()  # whose forms are still to be compiled
        self._clock, self._thread_clock, self._eos = clock, thread_clock or clock, frozenset(eos_token_ids)
        self._outputs: list[Output] = []  # to be sent with the current or the next step
        self._stats = Stats(num_blocks=runner.num_blocks)

    @property
    def has_work(self) -> bool:
        """Whether a sequence waits or runs, or an output has not been sent yet."""
        return bool(self.sequences or self._outputs)

    def submit(self, submit: Submit) -> None:
        """Queue a sequence; if it cannot be served, its failure is among the next step's outputs."""
        try:
            failure = self._refusal(submit)
            sequence = Sequence.of(submit) if failure is None else None
        except Exception:  # of this request alone: nothing is changed yet
            log.exception("a request raised when it was queued", extra={"sequence": submit.sequence_id})
            failure, sequence = INTERNAL, None
        if sequence is None:
            self._outputs.append(Output(submit.sequence_id, failure=failure))
            return
        self.sequences[submit.sequence_id] = sequence
        self.adapters.use(sequence.digests)
        self.scheduler.add(sequence)
        if sequence.is_form_due:
            self._formless[sequence.id] = sequence

    def abort(self, sequence_id: str) -> None:
        """Free a sequence without an output; it is no error if the sequence has ended already."""
        if sequence_id in self.sequences:
            self._finish(self.sequences[sequence_id])

    def discard(self, digest: str) -> None:
        """Drop the copies of a deleted artifact as soon as no sequence uses it."""
        self.adapters.discard(digest)

    def stage(self, digest: str, folder: str | None) -> None:
        """Load an artifact from a folder of the staging area from now on, and at once; None: from the store again."""
        self._staged.pop(digest, None)
        if folder is not None:
            self._staged[digest] = folder
            self.adapters.renew(digest)

    def keep_resident(self, digests: list[str]) -> None:
        """Keep these in slots even if no sequence uses them, the most important first; replaces the previous list."""
        self.adapters.keep_resident(digests)

    def renew(self, digest: str) -> None:
        """Forget the load failures of an artifact that was uploaded again: its next load may start at once."""
        self.adapters.renew(digest)

    def step(self) -> StepDone | None:
        """Compute the next tokens of the sequences that can run; None if nothing was computed and nothing ended."""
        plan = self._schedule()
        if plan.rows:
            began = self._clock()
            sampled = self._run(plan)
            self._commit(plan, sampled)
            self._stats.step_seconds_total += self._clock() - began
        if not plan.rows and not self._outputs:
            return None
        outputs, self._outputs = self._outputs, []
        return StepDone(outputs, self.stats())

    def stats(self) -> Stats:
        """Return a copy of the gauges and counters as they are now."""
        stats, pool, adapters = self._stats, self.pool, self.adapters
        stats.num_running, stats.num_waiting = len(self.scheduler.running), self.scheduler.num_waiting
        stats.num_blocks_used, stats.num_blocks_cached = pool.num_blocks - pool.num_free, pool.num_cached
        stats.slot_bytes_used, stats.num_slots = adapters.slots.used, len(adapters.slots.sizes)
        stats.host_bytes_used, stats.num_host = adapters.host.used, len(adapters.host.sizes)
        stats.num_pins, stats.num_quarantined = adapters.num_pins, adapters.num_quarantined
        stats.loads_total, stats.load_seconds_total = adapters.loads_total, adapters.load_seconds_total
        stats.load_failures_total, stats.evictions_total = adapters.load_failures_total, adapters.evictions_total
        return copy(stats)  # another thread encodes it

    def assert_consistent(self) -> None:
        """Raise `InvariantError` unless all blocks, pins and users belong to the sequences that wait and run."""
        self.pool.assert_consistent(sequence.table for sequence in self.sequences.values())
        users = Counter(digest for sequence in self.sequences.values() for digest in sequence.digests)
        pinned = [sequence for sequence in self.sequences.values() if sequence.first_admitted is not None]
        pins = Counter(digest for sequence in pinned for digest in sequence.digests)
        self.adapters.assert_consistent(pins, users)

    def _refusal(self, submit: Submit) -> EngineFailure | None:
        """Say why a sequence cannot be queued, or None if it can.

        The API process refuses malformed requests before; this is the engine's own guard.
        """
        num_tokens = len(submit.prompt) + len(submit.answered) + sum(adapter.num_virtual for adapter in submit.adapters)
        max_tokens, num_new = self.max_sequence_tokens, submit.sampling.max_tokens
        if not submit.prompt or num_tokens + min(1, num_new) > max_tokens or num_new < 0:
            message = f"a prompt of {num_tokens} tokens for {num_new} more; between 1 and {max_tokens} fit"
            return EngineFailure("internal", message)
        if submit.sequence_id in self.sequences:
            return EngineFailure("internal", f"a sequence {submit.sequence_id} runs already")
        if submit.form is not None and self._forms is None:
            return EngineFailure("internal", "the answers of this base cannot be held to a form")
        if self.scheduler.is_full(submit.namespace):
            max_waiting = self.scheduler.limits.max_waiting
            return EngineFailure("overloaded", f"{max_waiting} requests wait already; try again in a moment")
        return self.adapters.refusal(tuple(adapter.digest for adapter in submit.adapters))

    def _schedule(self) -> StepPlan:
        now, scheduler = self._clock(), self.scheduler
        self._end_late(now)
        self._advance_adapters()
        self._advance_forms()
        plan = scheduler.plan(self.adapters, now)
        for sequence in plan.admitted:
            self.adapters.pin(sequence.digests)
            self._stats.cache_query_tokens_total += sequence.num_prompt - sequence.num_virtual
            self._stats.cache_hit_tokens_total += sequence.num_cached_prompt
        self._stats.preemptions_total += plan.num_preempted
        return plan

    def _end_late(self, now: float) -> None:
        for sequence in [sequence for sequence in self.sequences.values() if sequence.deadline <= now]:
            self._fail(sequence, EngineFailure("deadline_exceeded", "the request did not end before its deadline"))

    def _advance_adapters(self) -> None:
        """Let the adapter manager advance, and fail waiting sequences whose adapters failed to load.

        No more copies are made than rows are free: no other sequence could use them in this step. Running sequences
        wait meanwhile: that time is counted, and as a stall if it is longer than `NO_STALL_S`.
        """
        scheduler, adapters, began = self.scheduler, self.adapters, self._thread_clock()
        num_free_rows = scheduler.limits.max_running - len(scheduler.running)
        has_news = adapters.advance(scheduler.wanted(), num_free_rows)
        if scheduler.running:
            seconds = self._thread_clock() - began
            self._stats.adapter_seconds_total += seconds
            self._stats.stall_seconds_total += seconds if seconds > NO_STALL_S else 0.0
        for sequence in list(scheduler.waiting()) if has_news else ():
            if failure := adapters.refusal(sequence.digests):
                self._fail(sequence, failure)

    def _advance_forms(self) -> None:
        """Take in the forms that were compiled, and begin with those of the sequences that come next."""
        if self._forms is None:
            return
        for result in self._forms.results():
            sequence = result.owner
            if sequence.id not in self.sequences:
                continue
            sequence.form = result.form if result.error is None else None
            if result.error is not None:
                self._fail(sequence, self._form_failure(result.error, sequence))
        for sequence in self.scheduler.next_forms() if self._formless else ():
            if self._formless.pop(sequence.id, None) is not None and sequence.grammar is not None:
                ends = self._eos.union(sequence.sampling.stop_token_ids)
                self._forms.start(sequence, sequence.grammar, sequence.tokens[sequence.num_prompt :], ends)

    @staticmethod
    def _form_failure(error: BaseException, sequence: Sequence) -> EngineFailure:
        if isinstance(error, FormError):
            return EngineFailure("unsupported_schema", f"the answer's form cannot be served: {error}")
        log.error("a form raised", extra={"sequence": sequence.id}, exc_info=error)
        return INTERNAL

    def _run(self, plan: StepPlan) -> Iterable[Result]:
        """Run one forward pass. If it raises, each row runs alone, and only the rows that raise alone fail."""
        rows = [self._prepared(sequence, num_tokens) for sequence, num_tokens in plan.rows]
        self._stats.steps_total += 1
        self._stats.rows_total += len(rows)
        self._stats.tokens_total += plan.num_tokens
        results = iter(self._run_rows([row for row in rows if isinstance(row, Row)]))
        return [next(results) if isinstance(row, Row) else row for row in rows]

    def _prepared(self, sequence: Sequence, num_tokens: int) -> Row | EngineFailure:
        """Make a sequence's row and copy the block that it begins with; a failure if that raises.

        In the plan's order: a later one's target may be an earlier one's source.
        """
        try:
            row = self._row(sequence, num_tokens)
            if sequence.table.copy is not None:
                self.runner.copy(*sequence.table.copy)
                sequence.table.copy = None
        except FormError as error:
            return self._form_failure(error, sequence)
        except Exception:
            log.exception("a sequence raised before its step", extra={"sequence": sequence.id})
            return INTERNAL
        return row

    def _run_rows(self, rows: list[Row]) -> Iterable[Result]:
        try:
            return self.runner.run(rows) if rows else []
        except Exception:
            log.exception("a step raised; its rows run one by one", extra={"num_rows": len(rows)})
        return [self._run_alone(row) for row in rows]

    def _run_alone(self, row: Row) -> Result:
        try:
            return self.runner.run([row])[0]
        except Exception:
            log.exception("a row raised alone")
            return INTERNAL

    def _row(self, sequence: Sequence, num_tokens: int) -> Row:
        start, end = sequence.num_computed, sequence.num_computed + num_tokens
        virtual, is_last = sequence.num_virtual, end == len(sequence.tokens)
        sampling = sequence.sampling if is_last and sequence.sampling.max_tokens else None
        return Row(
            tokens=sequence.tokens[start:end],
            start=start,
            blocks=sequence.table.blocks,
            adapters=tuple((self.adapters.slot(adapter.digest), adapter.weight) for adapter in sequence.adapters),
            sampling=sampling,
            history=sequence.tokens[virtual:end] if virtual or not is_last else sequence.tokens,
            num_prompt=sequence.num_prompt - virtual,
            num_virtual=virtual,
            targets=sequence.targets(num_tokens),
            mask=None if sequence.form is None or sampling is None else sequence.form.mask(),
        )

    def _commit(self, plan: StepPlan, results: Iterable[Result]) -> None:
        now = self._clock()
        for (sequence, num_tokens), result in zip(plan.rows, results, strict=True):
            try:
                failure = self._row_failure(sequence, result)
                if failure is None:
                    self._advance(sequence, num_tokens, result, now)
            except Exception:
                log.exception("a sequence raised after its step", extra={"sequence": sequence.id})
                failure = INTERNAL
            if failure is not None:
                self._fail(sequence, failure)

    def _advance(self, sequence: Sequence, num_tokens: int, result: Result, now: float) -> None:
        sequence.num_computed += num_tokens
        self.pool.publish(sequence.table, sequence.tokens, sequence.num_computed)
        is_read = sequence.sampling.max_tokens == 0 and sequence.remainder == 0
        if isinstance(result, Sampled):
            self._append(sequence, result, now, is_read)
        elif is_read:
            self._append(sequence, Sampled(), now, is_read)

    @staticmethod
    def _row_failure(sequence: Sequence, result: Result) -> EngineFailure | None:
        if isinstance(result, Sampled) and result.error is not None:
            if result.is_internal:
                return EngineFailure("internal", result.error)
            digests = ", ".join(digest[:12] for digest in sequence.digests) or "none (the base)"
            return EngineFailure("nonfinite_logits", f"{result.error}; adapters: {digests}")
        return result if isinstance(result, EngineFailure) else None

    def _append(self, sequence: Sequence, sampled: Sampled, now: float, is_read: bool) -> None:
        """Append a token and scores; `is_read` tells the end of a prompt that is only scored."""
        output = Output(sequence.id, scores=sampled.scores)
        output.cached_tokens, output.virtual_tokens = sequence.num_cached_prompt, sequence.num_virtual
        sequence.note_scored(len(sampled.scores))
        if sampled.token >= 0:
            output.logprobs = [] if sampled.logprobs is None else [sampled.logprobs]
            self._take(sequence, sampled.token, output)
            self._fast_forward(sequence, output)
        elif is_read:
            output.finish_reason = "length"
        if is_read or (output.token_ids and sequence.num_output == len(output.token_ids)):
            output.timing = self._timing(sequence, now)
        self._outputs.append(output)
        if output.finish_reason is not None:
            self._finish(sequence)

    def _take(self, sequence: Sequence, token: int, output: Output) -> None:
        """Append a token to an answer and its output."""
        sequence.tokens.append(token)
        output.token_ids.append(token)
        output.finish_reason = self._finish_reason(sequence, token)
        if sequence.form is not None and output.finish_reason is None:
            sequence.form.take([token])

    def _fast_forward(self, sequence: Sequence, output: Output) -> None:
        """Append the tokens that must follow by the form: no step is needed to sample them.

        The next step computes them as it does a prompt's. Log-probabilities need a step each.
        """
        sequence.num_fast_forward, sampling = 0, sequence.sampling
        if sequence.form is None or sampling.logprobs is not None or sampling.forced:
            return
        while output.finish_reason is None and sequence.num_fast_forward < MAX_FAST_FORWARD:
            token = sequence.form.only_token()
            if token is None:
                return
            self._take(sequence, token, output)
            sequence.num_fast_forward += 1
            self._stats.fast_forward_tokens_total += 1

    def _finish_reason(self, sequence: Sequence, token: int) -> str | None:
        if sequence.sampling.is_end(token, self._eos):
            return "stop"
        is_full = len(sequence.tokens) >= self.max_sequence_tokens
        return "length" if is_full or sequence.num_output >= sequence.sampling.max_tokens else None

    @staticmethod
    def _timing(sequence: Sequence, now: float) -> Timing:
        admitted = now if sequence.first_admitted is None else sequence.first_admitted
        queued = admitted - sequence.arrived - sequence.load_seconds
        return Timing(1e3 * max(0.0, queued), 1e3 * sequence.load_seconds, 1e3 * (now - sequence.arrived))

    def _fail(self, sequence: Sequence, failure: EngineFailure) -> None:
        self._outputs.append(Output(sequence.id, failure=failure))
        self._finish(sequence)

    def _finish(self, sequence: Sequence) -> None:
        """End a sequence, the only way it can: give back its blocks, pins and users."""
        self.scheduler.remove(sequence)
        self.adapters.release(sequence.digests, is_pinned=sequence.first_admitted is not None)
        del self.sequences[sequence.id]
        self._formless.pop(sequence.id, None)
