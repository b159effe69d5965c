"""Ask a running server over HTTP, for the commands that need one; errors are sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0


def ask(url: str, key: str | None, verb: str, path: str, body: object = None) -> dict[str, Any]:
    """The server's JSON answer. Raises `ValueError` with its own sentence if it refuses, or `httpx.HTTPError`."""
    headers = [] if key is None else [(b"Authorization", f"Bearer {key}".encode())]
    answer = httpx.request(verb, f"{url.rstrip('/')}{path}", json=body, headers=headers, timeout=TIMEOUT_S)
    try:
        result: dict[str, Any] = answer.json() if answer.content else {}
    except ValueError:
        raise ValueError(f"{url} answered {answer.status_code}, and not as manyhats does") from None
    if not answer.is_success:
        raise ValueError(f"{answer.status_code}: {result['error']['message']}")
    return result


@contextmanager
def sentences(command: str) -> Iterator[None]:
    """Turn an error of `manyhats COMMAND` into a sentence and exit code 1."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        reason = f"[bold red]manyhats {command}:[/] {escape(str(error))}"
        Console(stderr=True).print(reason, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
