"""HTTP/1.1 with bounds on every part of a request before it is complete: its bytes, its time, and its headers' number.

uvicorn's parser keeps a URL, a header or a trailer until it ends, however long that is. The API bounds bodies itself.
"""

from __future__ import annotations

import json
import uuid
from asyncio import BaseTransport, TimerHandle
from http import HTTPStatus

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.errors import BadRequestError, HeadersTooLargeError, ServerError, UriTooLongError

HEADER_TIMEOUT_S = 20.0  # from a connection's first moment, or a request's first byte, to the end of its headers
MAX_HEAD_BYTES = 64 * 1024  # of a URL and all headers, and of whatever else is not a body
MAX_HEADERS = 128
MAX_PIPELINED = 16  # requests of a connection that wait for the answer to an earlier one


class BoundedProtocol(HttpToolsProtocol):
    """Speaks HTTP/1.1 and refuses, with an error of the API's form, what exceeds the bounds or is no HTTP at all."""

    _timer: TimerHandle | None = None
    _pending = 0  # bytes since something of a request was complete
    _head_bytes = 0  # of the URL and of what headers of this request there are
    _refusal: ServerError | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        """Start the timer for the connection's first request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._arm()

    def data_received(self, data: bytes) -> None:
        """Take bytes: refuse what stays incomplete beyond the bound, and time the headers of a request once begun."""
        self._pending += len(data)
        super().data_received(data)
        if self.parser is None or self.transport.is_closing():
            return
        if self._pending > MAX_HEAD_BYTES:
            self._refusal = self._too_large()
            self.send_400_response("")
        elif self.cycle is None or self.cycle.response_complete:
            self._arm()

    def on_message_begin(self) -> None:
        """Begin to count a request."""
        self._head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the URL."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header or a trailer."""
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Stop the timer: the headers are complete."""
        self._disarm()
        self._pending = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = BadRequestError(f"more than {MAX_PIPELINED} requests wait on one connection")
            raise self._refusal
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, which the API bounds."""
        self._pending = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End a request; more may follow in what was received."""
        self._pending = 0
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer: the connection is lost."""
        self._disarm()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, or exceeds the bounds, in the API's form of errors, and close."""
        error = self._refusal or BadRequestError(f"this is no HTTP request that can be read: {msg}")
        cycle = self.cycle
        is_between = cycle is None or cycle.response_complete or not cycle.response_started
        if is_between and not self.pipeline:  # else it would stand within another answer, or be taken for it
            body = json.dumps(error.wire(uuid.uuid4().hex)).encode()
            status = f"{error.status} {HTTPStatus(error.status).phrase}"
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
            self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self.logger.warning("a request was refused before it was complete", extra={"reason": str(error)})
        self.transport.close()

    def _count(self, num_bytes: int) -> None:
        """Count a part of a head. Raises to the parser, which stops and calls `send_400_response`."""
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES or len(self.headers) > MAX_HEADERS:
            self._refusal = self._too_large()
            raise self._refusal

    def _too_large(self) -> ServerError:
        if self.scope is not None and not self.headers and len(self.url) * 2 > self._pending:
            return UriTooLongError(f"the URL is longer than {MAX_HEAD_BYTES} bytes", "url")
        return HeadersTooLargeError(
            f"the headers have more than {MAX_HEAD_BYTES} bytes or are more than {MAX_HEADERS}", "headers"
        )

    def _arm(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(HEADER_TIMEOUT_S, self._time_out)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _time_out(self) -> None:
        self._timer = None
        self.transport.close()
