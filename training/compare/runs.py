"""The base scored and methods trained, each in a process of its own, whose peak memory is its own.

What it tells comes through a pipe.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection

from rich.console import Console

from training.errors import BaseError, DataError, TrainingError
from training.evaluation.evaluate import Scores
from training.report.progress import ProgressDisplay
from training.report.step_log import Step
from training.run.distributed import Processes
from training.run.job import Job
from training.run.pipeline import run_job, score_base

LEAVE_WITHIN_S = 10
COMMON = (DataError, BaseError)  # what is wrong with data or base is so for every method


@dataclass(frozen=True)
class News:
    """Where a run is: `share` of what `text` says."""

    text: str
    share: float


class MethodError(TrainingError):
    """A method that could not be trained; others may be."""


class PipeDisplay(ProgressDisplay):
    """Tells what it would draw."""

    def __init__(self, tell: Callable[[News], None]) -> None:
        super().__init__(Console(quiet=True))
        self._tell = tell

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """News of rows."""
        done = 0

        def more(count: int) -> None:
            nonlocal done
            done += count
            self._tell(News(what, done / max(total, 1)))

        yield more

    @contextmanager
    def training(self) -> Iterator[Callable[[Step], None]]:
        """News of steps."""

        def tell(step: Step) -> None:
            rate = step.tokens / max(step.seconds, 1e-9)
            self._tell(News(f"step {step.number}  loss {step.loss:.3f}  {rate:,.0f} tokens/s", step.progress))

        yield tell


def score_apart(job: Job, on_news: Callable[[News], None]) -> Scores:
    """The base's scores on a job's rows, from a new process. Raises as `train_apart`."""
    found = _apart(job, None, on_news)
    if found is None:
        raise MethodError(f"{job.base} was not scored")
    return found


def train_apart(job: Job, before: Scores, on_news: Callable[[News], None]) -> None:
    """Train in a new process, and write its artifact; `before` are the base's scores.

    Raises `MethodError` with the reason where that fails, `DataError` or `BaseError` where it would for every method.
    """
    _apart(job, before, on_news)


def _apart(job: Job, before: Scores | None, on_news: Callable[[News], None]) -> Scores | None:
    """The scores that the process told, if it told any."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, before, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        found = _listen(ours, on_news)
        process.join(LEAVE_WITHIN_S)
    finally:
        process.kill()
        process.join()
    if isinstance(found, TrainingError):
        raise found
    if process.exitcode != 0:
        raise MethodError(_ended(process.exitcode))
    return found


def _listen(pipe: Connection, on_news: Callable[[News], None]) -> TrainingError | Scores | None:
    """Until the other end is closed; the failure or the scores that it told of."""
    found = None
    while True:
        try:
            told = pipe.recv()
        except EOFError:
            return found
        if isinstance(told, News):
            on_news(told)
        else:
            found = told


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (is there too little memory?)" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"
    return f"its process ended with {code}"


def _work(job: Job, before: Scores | None, pipe: Connection) -> None:
    """The process: it trains where the base was scored, and else scores that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # at Ctrl-C the one that started it ends it
    processes = Processes(is_cpu=job.device == "cpu")
    try:
        if before is None:
            pipe.send(score_base(job, PipeDisplay(pipe.send), processes))
        else:
            run_job(job, PipeDisplay(pipe.send), processes, before)
    except COMMON as error:
        pipe.send(error)
    except TrainingError as error:
        pipe.send(MethodError(str(error)))
    except (OSError, RuntimeError, MemoryError) as error:  # a full disk, too little memory
        pipe.send(MethodError(f"{type(error).__name__}: {error}".splitlines()[0]))
    finally:
        processes.close()
