"""End a command that cannot do its work: with a sentence on stderr and exit code 1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape


def stop(reason: str, command: str, console: Console | None = None) -> typer.Exit:
    """Print why `manyhats COMMAND` ends; return the exit to raise."""
    console = console or Console(stderr=True)
    console.print(f"[bold red]manyhats {command}[/] {escape(reason)}", highlight=False, soft_wrap=True)
    return typer.Exit(1)


@contextmanager
def sentences(command: str) -> Iterator[None]:
    """Turn a `ValueError` of `manyhats COMMAND`, whose text is a sentence, into that sentence and exit code 1."""
    try:
        yield
    except ValueError as error:
        raise stop(str(error), f"{command}:") from None
