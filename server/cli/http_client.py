"""Ask a running server over HTTP, for the commands that need one; errors are sentences."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.markup import escape

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0
KEY_VARIABLES = ["MANYHATS_API_KEY", "MANYHATS_ADMIN_KEY"]  # the first that is set counts

Url = Annotated[str, typer.Option(help="of the server")]
ApiKey = Annotated[
    str | None,
    typer.Option(help="a key of the tenant, or the admin key, if the server asks for one", envvar=KEY_VARIABLES),
]


def ask(url: str, key: str | None, verb: str, path: str, body: object = None) -> dict[str, Any]:
    """The server's JSON answer. Raises `ValueError` with its own sentence if it refuses, or `httpx.HTTPError`."""
    return _read(url, _send(url, key, verb, path, body))


def download(url: str, key: str | None, path: str) -> bytes:
    """The bytes that the server answers. Raises as `ask` does."""
    answer = _send(url, key, "GET", path)
    if not answer.is_success:
        _read(url, answer)
    return answer.content


def _send(url: str, key: str | None, verb: str, path: str, body: object = None) -> httpx.Response:
    headers = [] if key is None else [(b"Authorization", f"Bearer {key}".encode())]
    return httpx.request(verb, f"{url.rstrip('/')}{path}", json=body, headers=headers, timeout=TIMEOUT_S)


def _read(url: str, answer: httpx.Response) -> dict[str, Any]:
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
