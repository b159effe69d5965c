"""Sentences of commands on stderr: hints, and the one with which a command ends that cannot do its work (code 1)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape

from adapters_store.escapes import printable


def stop(reason: str, command: str, console: Console | None = None) -> typer.Exit:
    """Print why `manyhats COMMAND` ends; return the exit to raise."""
    console = console or Console(stderr=True)
    shown = escape(printable(reason, kept="\n"))
    console.print(f"[bold red]manyhats {command}[/] {shown}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


def say(sentence: str, style: str | None = None) -> None:
    """Print a sentence on stderr as it is, but for what a terminal would obey."""
    shown = printable(sentence)
    Console(stderr=True).print(shown, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def sentences(command: str) -> Iterator[None]:
    """Turn an error of `manyhats COMMAND` that a user or a server caused into a sentence and exit code 1.

    The text of a `ValueError` is one; an `OSError` is of a file, and an `ArithmeticError` of a server's figures.
    """
    try:
        yield
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        raise stop(f"{where}{error.strerror or type(error).__name__}", f"{command}:") from None
    except ArithmeticError:
        raise stop("the server's figures cannot be shown; --json has them", f"{command}:") from None
    except ValueError as error:
        raise stop(str(error), f"{command}:") from None
