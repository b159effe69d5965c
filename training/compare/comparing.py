"""A comparison: train each method, serve all of them, and write the results after each."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from rich.console import Console
from rich.markdown import Markdown
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from adapters_store.cores import num_cores
from adapters_store.format.folder import MANIFEST
from training.compare import serving
from training.compare.plot import draw
from training.compare.results import RESULTS, Comparison, MethodOutcome, begin, outcome_of, write
from training.compare.runs import MethodError, News, score_apart, train_apart
from training.compare.scores import quality, scores_of
from training.compare.table import markdown
from training.data.files import digest_of
from training.methods import METHODS
from training.run.job import Job

TABLE, PLOT = "compare.md", "compare.png"
NO_ADAPTER = "it is a new base, and no adapter"


@dataclass
class Comparing:
    """A comparison on its way: its results so far, its jobs by method, and the folder that it is kept in."""

    comparison: Comparison
    jobs: Mapping[str, Job]
    out: Path
    console: Console

    @classmethod
    def begin(
        cls, jobs: Mapping[str, Job], out: Path, given: dict[str, object], words: Sequence[str], console: Console
    ) -> Comparing:
        """Begin in a new folder, or go on in that of the same comparison.

        `given` are the options that the outcome depends on, by flag; `words` are those of the command that repeats it.
        Raises `OptionError` if the folder holds something else, `DataError` if the rows cannot be read.
        """
        job = next(iter(jobs.values()))
        digests = {"the rows of --data": digest_of(job.data), "the rows of --eval": job.eval and digest_of(job.eval)}
        command = shlex.join(["manyhats", "compare", "--methods", ",".join(jobs), *words, "--out", str(out)])
        comparison = begin(out, Comparison({**given, **digests}, command, _machine()))
        out.mkdir(parents=True, exist_ok=True)
        return cls(comparison, jobs, out, console)

    def run(self) -> None:
        """Train and serve every method, and print the table.

        Raises `DataError` or `BaseError` if no method can be trained, `MethodError` if none was.
        """
        self._keep()
        with _bars(self.console) as progress:
            self._score_base(progress)
            tasks = {method: progress.add_task(method, total=1.0, status="", start=False) for method in self.jobs}
            for method, task in tasks.items():
                progress.start_task(task)
                self._train(method, progress, task)
                progress.stop_task(task)
                self._keep()
            if not self.comparison.outcomes:
                raise MethodError("\n".join(f"{name}: {why}" for name, why in self.comparison.failed.items()))
            self._serve(progress)
        self._keep()
        self.console.print(Markdown(markdown(self.comparison)))
        self.console.print(f"{self.out}: {RESULTS}, {TABLE} and {PLOT}", highlight=False, markup=False, soft_wrap=True)

    def _score_base(self, progress: Progress) -> None:
        """Score the base once for all methods, unless it was done or none is left to train."""
        missing = [job for job in self.jobs.values() if not _is_done(job)]
        if self.comparison.before is None and missing:
            task = progress.add_task("the base", total=1.0, status="")
            self.comparison.before = score_apart(missing[0], _tell(progress, task))
            progress.update(task, completed=1.0, status="scored")
            self._keep()

    def _train(self, method: str, progress: Progress, task: TaskID) -> None:
        """Train a method, unless its artifact exists already, and add its outcome or the reason why it failed."""
        job = self.jobs[method]
        try:
            if self.comparison.before is not None and not _is_done(job):
                train_apart(job, self.comparison.before, _tell(progress, task))
            outcome = outcome_of(method, job.out)
        except MethodError as error:
            self.comparison.failed[method] = str(error)
            self._fail(progress, task, f"{method} failed: {error}")
            return
        self.comparison.outcomes.append(outcome)
        progress.update(task, completed=1.0, status=_line(outcome))

    def _serve(self, progress: Progress) -> None:
        """Serve every adapter that a server takes, on one server; a failure is told, and no result is lost."""
        adapters = [outcome for outcome in self.comparison.outcomes if METHODS[outcome.method].is_uploadable]
        for outcome in self.comparison.outcomes:
            outcome.not_served = "" if outcome in adapters else NO_ADAPTER
        if not adapters:
            return
        task = progress.add_task("serving", total=len(adapters) * serving.NUM_ROUNDS, status="starting a server")
        job = next(iter(self.jobs.values()))
        try:
            with serving.start_server(job.base, job.device, job.cache) as client:
                progress.update(task, status="decoding in turn with the base")
                folders = {outcome.method: self.jobs[outcome.method].out for outcome in adapters}
                served = serving.measure(client, folders, lambda: progress.advance(task))
        except serving.ServingError as error:
            self._fail(progress, task, f"nothing is served: {error}")
            for outcome in adapters:
                outcome.not_served = str(error).splitlines()[0]
            return
        self.comparison.server = served.server
        for outcome in adapters:
            outcome.serving = served.methods.get(outcome.method)
            outcome.not_served = served.refused.get(outcome.method, "")

    def _fail(self, progress: Progress, task: TaskID, sentence: str) -> None:
        progress.update(task, status="[red]failed[/]")
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)

    def _keep(self) -> None:
        """Write the results so far: JSON, table and plot."""
        write(self.out / RESULTS, msgspec.json.format(msgspec.json.encode(self.comparison)) + b"\n")
        write(self.out / TABLE, markdown(self.comparison).encode())
        if self.comparison.outcomes:
            write(self.out / PLOT, draw(self.comparison))


def _is_done(job: Job) -> bool:
    return (job.out / MANIFEST).is_file()


def _tell(progress: Progress, task: TaskID) -> Callable[[News], None]:
    """Return a function that shows news of a run beside its bar."""
    return lambda news: progress.update(task, completed=news.share, status=escape(news.text))


def _bars(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=len("prefix_tuning"))),
        BarColumn(bar_width=16),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
    )


def _line(outcome: MethodOutcome) -> str:
    score = scores_of(outcome)[0]
    return f"{score.name} {score.show(quality(outcome))}, {outcome.steps} steps in {outcome.seconds:.0f} s"


def _machine() -> str:
    """Describe this machine: the number and the model of its cores."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.machine()
    return f"{num_cores()} cores, {name}"
