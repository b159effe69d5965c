"""Ask a running server over HTTP, for the commands that need one; errors are sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapters_store.escapes import json_line, url_path

if TYPE_CHECKING:
    import httpx2

URL = "http://127.0.0.1:8000"
TIMEOUT_S = 30.0
NO_CONTENT = 204  # what is deleted is answered by
KEY_VARIABLE = "MANYHATS_API_KEY"

Url = Annotated[str, typer.Option(help="of the server")]
ApiKey = Annotated[
    str | None,
    typer.Option(help="a key of the tenant, or the admin key, if the server asks for one", envvar=KEY_VARIABLE),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object: the server's answer, or what was done")]


def show_json(answer: object) -> None:
    """Print what a command found as one line of JSON, for scripts."""
    print(json_line(answer))  # noqa: T201 - the answer


class Server:
    """A running server, asked with a key; the parts of each path are quoted here.

    Every method raises `ValueError` with a sentence if the server refuses, is not reached, or is none of ours.
    """

    def __init__(self, url: str, key: str | None) -> None:
        self.url, self._key = url.rstrip("/"), key

    def ask(
        self, form: Any, verb: str, *path: str, body: object = None, query: dict[str, str] | None = None
    ) -> dict[str, Any]:
        """Return the server's JSON as it is, which has a form of `server.api.answers`; empty for the form None."""
        answer = self._send(verb, path, body, query)
        self._check(answer, form, answer.is_success if form is not None else answer.status_code == NO_CONTENT)
        result: dict[str, Any] = {} if form is None else answer.json()
        return result

    def download(self, *path: str) -> bytes:
        """Return the bytes that the server answers."""
        answer = self._send("GET", path)
        self._check(answer, None, answer.is_success)
        return answer.content

    def _send(
        self, verb: str, path: tuple[str, ...], body: object = None, query: dict[str, str] | None = None
    ) -> httpx2.Response:
        import httpx2  # it takes longer to import than a command's help may take

        whole = f"{self.url}{url_path(*path)}"
        try:
            headers = [] if self._key is None else [(b"Authorization", f"Bearer {self._key}".encode())]
            return httpx2.request(verb, whole, params=query, json=body, headers=headers, timeout=TIMEOUT_S)
        except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
            reason = str(error) or type(error).__name__
            raise ValueError(f"{self.url} cannot be reached: {reason}") from error

    def _check(self, answer: httpx2.Response, form: Any, is_done: bool) -> None:
        """Raise `ValueError` for an answer that is an error, or has another form than that."""
        from pydantic import TypeAdapter

        refusal = None
        try:
            if not is_done:
                refusal = f"{answer.status_code}: {answer.json()['error']['message']}"
            elif form is not None:
                TypeAdapter(form).validate_python(answer.json(), strict=True)
        except (ValueError, LookupError, TypeError, RecursionError):
            raise ValueError(f"{self.url} answered {answer.status_code}, and not as manyhats does") from None
        if refusal is not None:
            raise ValueError(refusal)
