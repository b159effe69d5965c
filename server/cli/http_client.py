"""Ask a running server over HTTP, for the commands that need one; errors are sentences."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import httpx2

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0
KEY_VARIABLE = "MANYHATS_API_KEY"

Url = Annotated[str, typer.Option(help="of the server")]
ApiKey = Annotated[
    str | None,
    typer.Option(help="a key of the tenant, or the admin key, if the server asks for one", envvar=KEY_VARIABLE),
]
Json = Annotated[bool, typer.Option("--json", help="print the server's answer as it is")]


def show_json(answer: object) -> None:
    """Print what a command found as one line of JSON, for scripts."""
    print(json.dumps(answer))  # noqa: T201 - the answer


def ask(url: str, key: str | None, verb: str, path: str, body: object = None) -> dict[str, Any]:
    """The server's JSON answer. Raises `ValueError` with a sentence if it refuses or is not reached."""
    return _read(url, _send(url, key, verb, path, body))


def download(url: str, key: str | None, path: str) -> bytes:
    """The bytes that the server answers. Raises as `ask` does."""
    answer = _send(url, key, "GET", path)
    if not answer.is_success:
        _read(url, answer)
    return answer.content


def _send(url: str, key: str | None, verb: str, path: str, body: object = None) -> httpx2.Response:
    import httpx2  # it takes longer to import than a command's help may take

    headers = [] if key is None else [(b"Authorization", f"Bearer {key}".encode())]
    try:
        return httpx2.request(verb, f"{url.rstrip('/')}{path}", json=body, headers=headers, timeout=TIMEOUT_S)
    except (httpx2.HTTPError, httpx2.InvalidURL) as error:
        raise ValueError(f"{url} cannot be reached: {error}") from error


def _read(url: str, answer: httpx2.Response) -> dict[str, Any]:
    try:
        result: dict[str, Any] = answer.json() if answer.content else {}
    except ValueError:
        raise ValueError(f"{url} answered {answer.status_code}, and not as manyhats does") from None
    if not answer.is_success:
        raise ValueError(f"{answer.status_code}: {result['error']['message']}")
    return result
