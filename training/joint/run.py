"""Many jobs from files to artifacts: each is prepared and finished as alone, but they take their steps together.

Every job takes a step at a time. One that is done leaves the batch and is scored and written at once, while the clock
of the others stands; one that breaks leaves it with its sentence.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from training.base import Base, load_base
from training.errors import OptionError, TrainingError, sentence
from training.evaluation.evaluate import Scores, Suite
from training.joint.shared_base import SharedBase, TwinAdapter, twin
from training.methods import METHODS, flag
from training.report.progress import ProgressDisplay
from training.report.step_log import Step
from training.run.distributed import Processes
from training.run.job import Done, Job, check
from training.run.pipeline import BASE, PreparedJob, dtype_of, finish, forgotten_if_failed, on_step, prepare, score
from training.run.trainer import PendingStep

T = TypeVar("T")
SAME = ("base", "device", "precision", "cache")  # of all jobs, as there is one base
NUM_CHECKED = 2  # rows of each job


@dataclass(frozen=True)
class Named:
    """A job by its number from 1."""

    number: int
    job: Job

    @property
    def name(self) -> str:
        """For sentences."""
        return f"job {self.number} ({self.job.out})"

    @property
    def label(self) -> str:
        """For a bar."""
        return f"{self.number} {self.job.out.name}"


class Stopwatch:
    """The seconds that jobs train: it stands while one of them is finished."""

    def __init__(self) -> None:
        self._stood = 0.0

    def __call__(self) -> float:
        return time.monotonic() - self._stood

    @contextmanager
    def stands(self) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._stood += time.monotonic() - began


@dataclass(frozen=True, eq=False)
class Member:
    """A job in the batch."""

    named: Named
    ready: PreparedJob
    adapter: TwinAdapter
    after_step: Callable[[Step], None]


def run_jobs(
    jobs: Sequence[Named], display: ProgressDisplay, processes: Processes, done: Callable[[Job, Done], None]
) -> int:
    """Train all and write their artifacts; how many broke. `done` hears of each that did not.

    Raises `TrainingError` where none can begin.
    """
    options = _check(jobs, processes)
    first = jobs[0].job
    base = load_base(first.base, first.device, first.cache, display.say)
    shared = SharedBase(base, dtype_of(first.precision, base))
    return _Crew(base, shared, display, processes, done).run(jobs, options)


class _Crew:
    """The jobs on their way."""

    def __init__(
        self,
        base: Base,
        shared: SharedBase,
        display: ProgressDisplay,
        processes: Processes,
        done: Callable[[Job, Done], None],
    ) -> None:
        self._base, self._shared, self._display = base, shared, display
        self._processes, self._done = processes, done
        self._clock, self._num_broken = Stopwatch(), 0
        self._scores: list[tuple[Suite, Scores]] = []  # of the base

    def run(self, jobs: Sequence[Named], options: Sequence[Any]) -> int:
        prepared = [self._prepare(named, own, len(jobs)) for named, own in zip(jobs, options, strict=True)]
        readies = [(named, ready) for named, ready in zip(jobs, prepared, strict=True) if ready is not None]
        with self._display.trainings([named.label for named, _ in readies]) as tells:
            members = [
                Member(named, ready, TwinAdapter(ready.adapter), on_step(ready, tell, self._processes))
                for (named, ready), tell in zip(readies, tells, strict=True)
            ]
            if members:
                self._shared.check_isolation({one.adapter: one.ready.rows.train_rows[:NUM_CHECKED] for one in members})
            for member in members:
                member.ready.trainer.begin()
            while members:
                members = self._step(members)
        return self._num_broken

    def _step(self, members: Sequence[Member]) -> list[Member]:
        """A step of every job that is not done; the members that are left."""
        pending_steps = {member: member.ready.trainer.next_pending() for member in members}
        going = {member: pending for member, pending in pending_steps.items() if pending is not None}
        for member in members:
            if member not in going:
                self._finish(member)
        if not going:
            return []
        losses = self._shared.backward({member.adapter: pending for member, pending in going.items()})
        return [member for member, pending in going.items() if self._take(member, pending, losses[member.adapter])]

    def _prepare(self, named: Named, options: Any, num_jobs: int) -> PreparedJob | None:
        how = self._display, self._processes, self._clock, num_jobs, self._scores_of
        return self._alone(named, lambda: prepare(named.job, options, twin(self._base), *how))

    def _scores_of(self, suite: Suite) -> Scores:
        """The base's, taken once for jobs that are scored on the same."""
        known = next((scores for other, scores in self._scores if other == suite), None)
        if known is None:
            known = score(self._base.model, suite, self._display, BASE)
            self._scores.append((suite, known))
        return known

    def _take(self, member: Member, pending: PendingStep, loss: float) -> bool:
        """Whether it could be taken."""

        def take() -> bool:
            with forgotten_if_failed(member.ready):
                member.after_step(member.ready.trainer.take(pending, loss))
            return True

        return self._alone(member.named, take) is not None

    def _finish(self, member: Member) -> None:
        run = member.ready.trainer.end()
        with self._clock.stands():
            done = self._alone(member.named, lambda: finish(member.ready, run, self._display, self._processes))
        if done is not None:
            self._done(member.named.job, done)

    def _alone(self, named: Named, do: Callable[[], T]) -> T | None:
        """What it gives; None where it breaks, which is told, and breaks no other job."""
        try:
            return do()
        except (TrainingError, OSError) as error:
            self._num_broken += 1
            self._display.fail(named.name, sentence(error, named.job.out))
            return None


def _check(jobs: Sequence[Named], processes: Processes) -> list[Any]:
    """Each job's options. Raises `OptionError` naming the job."""
    if processes.size > 1:
        raise OptionError("--jobs trains in one process: start it without accelerate launch.")
    outs: dict[Any, str] = {}
    for named in jobs:
        if (other := outs.setdefault(named.job.out.resolve(), named.name)) != named.name:
            raise OptionError(f"{named.name} has the out of {other}: give each a folder of its own.")
    return [_check_one(named, jobs[0]) for named in jobs]


def _check_one(named: Named, first: Named) -> Any:
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
        known = ", ".join(name for name, method in METHODS.items() if method.can_share)
        raise OptionError(f"{named.name}: --method {job.method} cannot train beside others: take one of {known}.")
    if job.plan.gradient_checkpointing:
        raise OptionError(f"{named.name}: --gradient-checkpointing cannot be used with --jobs: leave it out.")
    return options
