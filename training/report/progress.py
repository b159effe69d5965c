"""Progress of a run on a console: bars with loss, tokens per second and the time left; a table at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from adapters_store.escapes import printable
from training.evaluation.evaluate import Scores
from training.report.step_log import Step

PER_MILLE = 1000
SHOWN = {  # fields of `Scores` -> title and format in a table
    "exact_match": ("exact match", "{:.1%}"),
    "label_accuracy": ("accuracy by the labels' logits", "{:.1%}"),
    "perplexity": ("perplexity of the answer", "{:.2f}"),
    "rouge_l": ("ROUGE-L", "{:.3f}"),
    "bleu": ("BLEU", "{:.1f}"),
    "neutral_perplexity": ("perplexity of a neutral text", "{:.2f}"),
}


class ProgressDisplay:
    """Draws bars and tables on a console; a quiet console draws nothing."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, message: str) -> None:
        """Print a line as it is: names in it may look like the console's markup."""
        self.console.print(printable(message, kept="\n"), highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Show a bar over `total` rows; the function given takes how many more are done."""
        with self._progress() as progress:
            task = progress.add_task(what, total=total, status="")
            yield lambda count: progress.advance(task, count)

    @contextmanager
    def training(self) -> Iterator[Callable[[Step], None]]:
        """Show a bar over the share of a run that is done; the function given takes each step."""
        with self.trainings(["training"]) as (tell,):
            yield tell

    @contextmanager
    def trainings(self, names: Sequence[str]) -> Iterator[list[Callable[[Step], None]]]:
        """Show a bar for each of several runs at once; each function given takes the steps of one."""
        with self._progress() as progress:
            tasks = [progress.add_task(escape(name), total=PER_MILLE, status="") for name in names]
            yield [partial(_tell, progress, task) for task in tasks]

    def fail(self, what: str, reason: str) -> None:
        """Print the reason why `what` failed."""
        self.console.print(f"[bold red]{escape(what)}:[/] {escape(reason)}", highlight=False, soft_wrap=True)

    def scores(self, before: Scores, after: Scores) -> None:
        """Print a table of the base's scores beside the adapter's."""
        table = Table("", "base", "adapter")
        for name, (title, form) in SHOWN.items():
            values = getattr(before, name), getattr(after, name)
            if None not in values:
                table.add_row(title, *map(form.format, values))
        self.console.print(table)

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
        )


def _tell(progress: Progress, task: TaskID, step: Step) -> None:
    rate = step.tokens / max(step.seconds, 1e-9)
    status = f"step {step.number}  loss {step.loss:.3f}  {rate:,.0f} tokens/s"
    progress.update(task, completed=round(PER_MILLE * step.progress), status=status)
