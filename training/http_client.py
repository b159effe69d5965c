"""Requests to a manyhats server, whose errors are sentences."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import httpx2

STRANGE = "not as manyhats does"
NOT_OURS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of reading what another server says


class RequestError(Exception):
    """A request that failed. The text is a clause about the server; `status` is None if it was not reached.

    `reason` is the server's own sentence, or why it was not reached.
    """

    def __init__(self, verb: str, reason: str, status: int | None = None) -> None:
        super().__init__(f"{verb}: {reason}")
        self.reason, self.status = reason, status


def ask(
    send: Callable[..., httpx2.Response], method: str, url: str, allowed: Collection[int] = (), **request: Any
) -> httpx2.Response:
    """Send a request by `httpx2.request`, or a client's, and return the response. Raises `RequestError`.

    An error status in `allowed` is a response like any other.
    """
    try:
        response = send(method, url, **request)
    except (httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
        raise RequestError("cannot be reached", str(error) or type(error).__name__) from error
    if response.is_error and response.status_code not in allowed:
        raise RequestError("refuses", _message(response), response.status_code)
    return response


def _message(response: httpx2.Response) -> str:
    """Return the message of an error in the server's form, or a sentence that it has another form."""
    try:
        return str(response.json()["error"]["message"])
    except NOT_OURS:
        return f"it answers {response.status_code}, and {STRANGE}"
