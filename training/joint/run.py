"""Runs of many jobs together: each is prepared, scored and written as alone, but they take their steps in one batch.

Every job takes a step at a time. A job that is done leaves the batch and is scored and written at once, while the clock
of the others stands still; a job that fails leaves the batch with its sentence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from training.base import Base, load_base
from training.data.dataset import TokenizedRow, read_training_data
from training.data.form import form_of
from training.errors import OptionError, TrainingError, sentence
from training.evaluation.evaluate import Scores, score
from training.evaluation.suite import Suite, suite_of
from training.joint.shared_base import SharedBase, TwinAdapter, twin
from training.methods import METHODS, attach
from training.options import MethodOptions, flag
from training.report.progress import ProgressDisplay
from training.report.step_log import LiveLog
from training.run.artifact import write_artifact
from training.run.checkpoint import Checkpoint
from training.run.distributed import Processes
from training.run.identity import run_identity
from training.run.job import Job, check
from training.run.manifest import evaluation_entry, training_entry
from training.run.peak_memory import PeakMemory
from training.run.pipeline import SCORING_ADAPTER, SCORING_BASE, Done
from training.run.precision import DTYPES, compute_dtype
from training.run.recorder import Recorder, Tell
from training.run.trainer import PendingStep, Run, Trainer

T = TypeVar("T")
SAME = ("base", "device", "precision", "cache")  # options that all jobs share, as there is one base
NUM_CHECKED = 2  # rows of each job that show whether jobs disturb each other


@dataclass(frozen=True)
class Named:
    """A job with its number in the file, from 1."""

    number: int
    job: Job

    @property
    def name(self) -> str:
        """Name of the job in sentences."""
        return f"job {self.number} ({self.job.out})"

    @property
    def label(self) -> str:
        """Name of the job beside its bar."""
        return f"{self.number} {self.job.out.name}"


class Stopwatch:
    """A clock of seconds that jobs train, which stands still while one of them is scored and written."""

    def __init__(self) -> None:
        self._stood = 0.0

    def __call__(self) -> float:
        return time.monotonic() - self._stood

    @contextmanager
    def stands(self) -> Iterator[None]:
        """Stand still inside the block."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._stood += time.monotonic() - began


@dataclass(frozen=True, eq=False)
class Member:
    """A job in the batch: what its steps need, some of its rows, and its last stages, score and write."""

    named: Named
    twin: TwinAdapter
    trainer: Trainer
    recorder: Recorder
    rows: Sequence[TokenizedRow]
    finish: Callable[[Run], Done]


def run_jobs(
    jobs: Sequence[Named], display: ProgressDisplay, processes: Processes, on_done: Callable[[Job, Done], None]
) -> int:
    """Train all jobs and write their artifacts; return how many failed. `on_done` gets each that did not.

    Raises `TrainingError` if none can begin.
    """
    options = _check(jobs, processes)
    first = jobs[0].job
    base = load_base(first.base, first.device, first.cache, display.say, [each.job.max_length for each in jobs])
    shared = SharedBase(base, compute_dtype(first.precision, base.model.device))
    return _Batch(base, shared, display, processes, on_done).run(jobs, options)


class _Batch:
    """Jobs that train together."""

    def __init__(
        self,
        base: Base,
        shared: SharedBase,
        display: ProgressDisplay,
        processes: Processes,
        on_done: Callable[[Job, Done], None],
    ) -> None:
        self._base, self._shared, self._display = base, shared, display
        self._processes, self._on_done = processes, on_done
        self._clock, self._num_failed = Stopwatch(), 0
        self._scores: list[tuple[Suite, Scores]] = []  # of the base

    def run(self, jobs: Sequence[Named], options: Sequence[MethodOptions]) -> int:
        """Prepare all jobs, and take their steps until none is left; return how many failed."""
        prepared = [
            self._alone(named, self._prepare, named, own, len(jobs)) for named, own in zip(jobs, options, strict=True)
        ]
        members = [member for member in prepared if member is not None]
        with self._display.trainings([member.named.label for member in members]) as tells:
            told = dict(zip(members, tells, strict=True))
            if members:
                self._shared.check_isolation({member.twin: member.rows for member in members})
            for member in members:
                member.trainer.begin()
            while members:
                members = self._step(members, told)
        return self._num_failed

    def _prepare(self, named: Named, options: MethodOptions, num_jobs: int) -> Member:
        """Read a job's rows, score the base, and attach the method to a twin of it. Raises `TrainingError`."""
        job, base, processes, display = named.job, twin(self._base), self._processes, self._display
        data = read_training_data(job, base, job.plan.seed)
        if data.unread_note:
            display.say(data.unread_note)
        form = form_of(job.form, data)
        identity = run_identity(job, options, base, data)
        checkpoint = Checkpoint(job.out, identity)
        checkpoint.check(job.is_resumed, display.say)
        suite = suite_of(data, base, job.num_answers)
        before, memory = self._score_base(suite), PeakMemory(base.model)
        adapter = attach(job.method, options, base, data.train_rows, job.plan.seed)
        dtype = compute_dtype(job.precision, base.model.device)
        trainer = Trainer(adapter, data.train_rows, job.plan, processes, data.held_rows, dtype, self._clock)
        recorder = Recorder(checkpoint, LiveLog(job.out), job.plan.save_steps, processes.is_main)
        if job.is_resumed:
            recorder.restore(trainer, display.say)

        def finish(run: Run) -> Done:
            """Score what is stored, not what was trained, and write it. Raises `OSError`."""
            recorder.end_log()
            base_and_peak = memory.base_and_peak()
            adapter.finalize(DTYPES[job.save_dtype])
            after = score(adapter.model, suite, display.bar, SCORING_ADAPTER)
            training = training_entry(job, options, data, run, base.num_parameters, base_and_peak, num_jobs=num_jobs)
            evaluation = evaluation_entry(data, job.columns, before, after)
            num_bytes = write_artifact(job, base, data, adapter, form, trainer.steps, training, evaluation)
            checkpoint.remove()
            return Done(run, before, after, num_bytes)

        return Member(named, TwinAdapter(adapter), trainer, recorder, data.train_rows[:NUM_CHECKED], finish)

    def _score_base(self, suite: Suite) -> Scores:
        """Return the base's scores, taken once for jobs that are scored on the same rows."""
        scores = next((scores for other, scores in self._scores if other == suite), None)
        if scores is None:
            scores = score(self._base.model, suite, self._display.bar, SCORING_BASE)
            self._scores.append((suite, scores))
        return scores

    def _step(self, members: Sequence[Member], tells: Mapping[Member, Tell]) -> list[Member]:
        """Take a step of every job that is not done, and finish the others; return the members that are left."""
        pending_steps = {member: member.trainer.next_pending() for member in members}
        going = {member: pending for member, pending in pending_steps.items() if pending is not None}
        for member in members:
            if member not in going:
                self._finish(member)
        if not going:
            return []
        losses = self._shared.backward({member.twin: pending for member, pending in going.items()})
        return [
            member
            for member, pending in going.items()
            if self._alone(member.named, self._take, member, pending, losses[member.twin], tells[member])
        ]

    def _take(self, member: Member, pending: PendingStep, loss: float, tell: Tell) -> bool:
        """Take a job's step, whose gradients are there; return True. Raises `DivergedError`."""
        with member.recorder.cleaning_up():
            member.recorder.on_step(member.trainer, member.trainer.take(pending, loss), tell)
        return True

    def _finish(self, member: Member) -> None:
        """End a job's training, and score and write it, while the clock stands still."""
        run = member.trainer.end()
        with self._clock.stands():
            done = self._alone(member.named, member.finish, run)
        if done is not None:
            self._on_done(member.named.job, done)

    def _alone(self, named: Named, do: Callable[..., T], *inputs: Any) -> T | None:
        """Return what `do` gives; None if it fails, which is shown and counted, and disturbs no other job."""
        try:
            return do(*inputs)
        except (TrainingError, OSError) as error:
            self._num_failed += 1
            self._display.fail(named.name, sentence(error, named.job.out))
            return None


def _check(jobs: Sequence[Named], processes: Processes) -> list[MethodOptions]:
    """Return each job's options. Raises `OptionError` naming the job."""
    if processes.size > 1:
        raise OptionError("--jobs trains in one process: start it without accelerate launch.")
    outs: dict[Any, str] = {}
    for named in jobs:
        if (other := outs.setdefault(named.job.out.resolve(), named.name)) != named.name:
            raise OptionError(f"{named.name} has the out of {other}: give each a folder of its own.")
    return [_check_one(named, jobs[0]) for named in jobs]


def _check_one(named: Named, first: Named) -> MethodOptions:
    job = named.job
    for name in SAME:
        if getattr(job, name) != getattr(first.job, name):
            raise OptionError(
                f"{named.name} has {flag(name)} {getattr(job, name)}, {first.name} has {getattr(first.job, name)}: "
                "jobs share one base, so write it under `defaults`."
            )
    try:
        options = check(job)
    except OptionError as error:
        raise OptionError(f"{named.name}: {error}") from error
    if not METHODS[job.method].can_share:
        methods = ", ".join(name for name, method in METHODS.items() if method.can_share)
        raise OptionError(f"{named.name}: --method {job.method} cannot train beside others: take one of {methods}.")
    if job.plan.gradient_checkpointing:
        raise OptionError(f"{named.name}: --gradient-checkpointing cannot be used with --jobs: leave it out.")
    return options
