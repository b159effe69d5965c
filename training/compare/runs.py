"""Runs in processes of their own, so that each one's peak memory is its own; their news come through a pipe."""

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
COMMON = (DataError, BaseError)  # a fault of data or base is one for every method


@dataclass(frozen=True)
class News:
    """News of a run: `text` says what it does, `share` how much of it is done."""

    text: str
    share: float


class MethodError(TrainingError):
    """A method could not be trained; others may be."""


class PipeDisplay(ProgressDisplay):
    """Sends news instead of drawing."""

    def __init__(self, tell: Callable[[News], None]) -> None:
        super().__init__(Console(quiet=True))
        self._tell = tell

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Send news of the rows that are done, as of a bar."""
        done = 0

        def more(count: int) -> None:
            nonlocal done
            done += count
            self._tell(News(what, done / max(total, 1)))

        yield more

    @contextmanager
    def training(self) -> Iterator[Callable[[Step], None]]:
        """Send news of the steps that are taken."""

        def tell(step: Step) -> None:
            rate = step.tokens / max(step.seconds, 1e-9)
            self._tell(News(f"step {step.number}  loss {step.loss:.3f}  {rate:,.0f} tokens/s", step.progress))

        yield tell


def score_apart(job: Job, on_news: Callable[[News], None]) -> Scores:
    """Score the base on a job's rows in a new process. Raises as `train_apart`."""
    scores = _apart(job, None, on_news)
    if scores is None:
        raise MethodError(f"{job.base} was not scored")
    return scores


def train_apart(job: Job, before: Scores, on_news: Callable[[News], None]) -> None:
    """Train in a new process, and write its artifact; `before` are the base's scores.

    Raises `MethodError` with the reason if it fails, `DataError` or `BaseError` if it would for every method.
    """
    _apart(job, before, on_news)


def _apart(job: Job, before: Scores | None, on_news: Callable[[News], None]) -> Scores | None:
    """Run a job's process to its end; return the scores that it sent, if any. Raises `TrainingError`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(job, before, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        result = _listen(ours, on_news)
        process.join(LEAVE_WITHIN_S)
    finally:
        process.kill()
        process.join()
    if isinstance(result, TrainingError):
        raise result
    if process.exitcode != 0:
        raise MethodError(_ended(process.exitcode))
    return result


def _listen(pipe: Connection, on_news: Callable[[News], None]) -> TrainingError | Scores | None:
    """Receive until the other end is closed; return the failure or the scores that came beside news."""
    result = None
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return result
        if isinstance(message, News):
            on_news(message)
        else:
            result = message


def _ended(code: int | None) -> str:
    if code is not None and code < 0:
        hint = " (is there too little memory?)" if -code == signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"
    return f"its process ended with {code}"


def _work(job: Job, before: Scores | None, pipe: Connection) -> None:
    """Be the process: train the job if the base's scores are given, else score the base and send the scores."""
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
