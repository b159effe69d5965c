"""Errors of training, as sentences for the user. The command prints them and exits with 1.

TrainingError
├── DataError       a data set's file, line or column
├── BaseError       the base cannot be loaded
├── OptionError     an option's value
├── DivergedError   the loss is not a number
└── PushError       a server that is not reached, or refuses
"""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape

from adapters_store.escapes import printable


class TrainingError(Exception):
    """A failure, as a sentence that names the offending thing and says what to do next."""


class DataError(TrainingError):
    """A data set that cannot be trained on; the sentence names its file and line."""


class BaseError(TrainingError):
    """The base cannot be found, fetched or loaded."""


class OptionError(TrainingError):
    """An option whose value cannot be used; the sentence names it."""


class DivergedError(TrainingError):
    """The loss became NaN or infinite; the sentence names the step and the lines of its batch."""


class PushError(TrainingError):
    """A server was not reached or refuses; the sentence has its own words."""


def sentence(error: TrainingError | OSError, out: Path) -> str:
    """Return an error as the sentence that the command prints; `out` is the path that was to be written."""
    if isinstance(error, OSError):
        return f"{out} cannot be written: {error.strerror or error}"
    return str(error)


def stop(console: Console, reason: str, command: str = "train") -> typer.Exit:
    """Print why a command ends; return the exit to raise."""
    shown = escape(printable(reason, kept="\n"))
    console.print(f"[bold red]manyhats {command}:[/] {shown}", highlight=False, soft_wrap=True)
    return typer.Exit(1)
