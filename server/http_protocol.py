"""HTTP/1.1 with bounds on every part of a request before it is complete: its bytes, its time, and its headers' number.

uvicorn's parser keeps a URL, a header or a trailer until it ends, however long that is. The API bounds bodies itself.
An upgrade that a request offers is not taken, and its body is read; HTTP/1.0 has answers without chunks. Reading never
waits for an answer, or a client that leaves would not be noticed; one that does not read its answer is cut off. What
comes behind an answer that did not wait for it is read on for a while: closed at once, the answer could be lost.
"""

from __future__ import annotations

import json
import resource
import time
import uuid
from asyncio import BaseTransport, TimerHandle
from http import HTTPStatus
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from server.errors import BadRequestError, HeadersTooLargeError, ServerError, TooManyConnectionsError, UriTooLongError

HEADER_TIMEOUT_S = 20.0  # from a connection's first moment, or a request's first byte, to the end of its headers
MAX_HEAD_BYTES = 64 * 1024  # of a URL and all headers, and of whatever else is not a body
MAX_HEADERS = 128
MAX_PIPELINED = 16  # requests of a connection that wait for the answer to an earlier one
MAX_PIPELINED_BYTES = 2**20  # of their bodies
MAX_UNREAD_S = 60.0  # in which a client takes nothing of what waits for it
MAX_FRAMING = 8  # bytes around each byte of a body in chunks; a chunk of one byte has 5
MAX_SMALL_PARTS = 2**14  # of a body, that come in less than `MIN_PART_BYTES` each: every part costs as a call does
MIN_PART_BYTES = 512
MAX_UNWANTED_BYTES = 16 * 2**20  # behind an answer that did not wait for them
LINGER_S = 5.0  # that a refused connection is read on
MAX_FILES = 2**20  # that are counted on, where the limit of open files is higher or there is none

FRAMING = (b"content-length", b"transfer-encoding")


def max_connections() -> int:
    """Half of the files that the process may have open; the rest is for files and the engine."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (MAX_FILES if soft == resource.RLIM_INFINITY else min(soft, MAX_FILES)) // 2


MAX_CONNECTIONS = max_connections()


class UpgradeIgnoringParser(httptools.HttpRequestParser):
    """Reads a request that offers an upgrade to its end: the library leaves its body to another protocol."""

    def __init__(self, protocol: BoundedProtocol) -> None:
        super().__init__(protocol)
        self._protocol = protocol

    def feed_data(self, data: Any) -> None:
        """Parse bytes. After an offer, the rest stands behind a head without one, which the protocol does not hear."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self.feed_data(self._protocol.begin_again() + data[offer.args[0] :])


class BoundedProtocol(HttpToolsProtocol):
    """Speaks HTTP/1.1 and refuses, with an error of the API's form, what exceeds the bounds or is no HTTP at all."""

    _running: RequestResponseCycle | None = None
    _is_again = False  # the parser is in a head that was heard already
    _timer: TimerHandle | None = None
    _reader_timer: TimerHandle | None = None
    _pending = 0  # bytes since something of a request was complete
    _head_bytes = 0  # of the URL and of what headers of this request there are
    _is_in_body = False  # of the request that came last
    _num_parts = 0.0  # of its body, less one for every `MIN_PART_BYTES`
    _num_unwanted = 0  # bytes behind its answer
    _idle_since = 0.0  # it waits for a request
    _is_refused = False  # the answer says so, and what follows is thrown away
    _refusal: ServerError | None = None

    def connection_made(self, transport: BaseTransport) -> None:
        """Start the timer for the connection's first request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self.parser = UpgradeIgnoringParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn's
        self._idle_since = time.monotonic()
        self._arm()
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()

    def _make_room(self) -> None:
        """Close the connection that has waited longest for its request; this one is refused if all others are busy."""
        idle = [one for one in self.connections if isinstance(one, BoundedProtocol) and one.is_idle and one is not self]
        if idle:
            min(idle, key=lambda one: one._idle_since).transport.close()
        else:
            self._refusal = TooManyConnectionsError(
                f"{MAX_CONNECTIONS} connections are busy already; try again in a moment"
            )
            self.send_400_response("")

    @property
    def is_idle(self) -> bool:
        """Whether it is open, and no request is complete to its body that has no whole answer."""
        return not self.transport.is_closing() and (not self._has_cycle or self.cycle.response_complete)

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for one."""
        self._idle_since = time.monotonic()
        super().on_response_complete()

    def begin_again(self) -> bytes:
        """Return a head that frames the body as this request's does, and be deaf to it."""
        self._is_again = True
        framing = b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] in FRAMING)
        return b"POST / HTTP/1.1\r\n" + framing + b"\r\n"

    def data_received(self, data: bytes) -> None:
        """Take bytes: refuse what stays incomplete beyond the bound, and time the headers of a request once begun."""
        if self._is_refused:
            self._discard(len(data))
            return
        self._pending += len(data)
        super().data_received(data)
        if self.parser is None or self._is_refused or self.transport.is_closing():
            return
        if self._pending > MAX_HEAD_BYTES:
            self._refusal = self._too_large()
            self.send_400_response("")
        elif self.cycle is None or self.cycle.response_complete:
            self._arm()

    def on_message_begin(self) -> None:
        """Begin to count a request."""
        if not self._is_again:
            self._head_bytes = 0
            super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """Take a part of the URL."""
        if not self._is_again:
            super().on_url(url)
            self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header or a trailer."""
        if self._is_again:
            return
        super().on_header(name, value)
        self._count(len(name) + len(value))

    def on_headers_complete(self) -> None:
        """Stop the timer: the headers are complete."""
        if self._is_again:
            self._is_again = False
            return
        self._disarm()
        self._pending = 0
        if len(self.pipeline) >= MAX_PIPELINED:
            self._refusal = BadRequestError(f"more than {MAX_PIPELINED} requests wait on one connection")
            raise self._refusal
        self._is_in_body, self._num_parts, self._num_unwanted = True, 0.0, 0
        super().on_headers_complete()
        self._read_on()

    def on_body(self, body: bytes) -> None:
        """Take a part of the body, which the API bounds once it reads it."""
        self._pending = max(0, self._pending - MAX_FRAMING * len(body))
        self._num_parts += 1 - len(body) / MIN_PART_BYTES
        if self._num_parts > MAX_SMALL_PARTS:
            self._refusal = BadRequestError(
                f"the body comes in more than {MAX_SMALL_PARTS} small chunks; send larger ones"
            )
            raise self._refusal
        if self.cycle.response_complete:
            self._discard(len(body))
        super().on_body(body)
        if sum(len(cycle.body) for cycle, _ in self.pipeline) > MAX_PIPELINED_BYTES:
            self._refusal = BadRequestError(f"requests of more than {MAX_PIPELINED_BYTES} bytes wait on one connection")
            raise self._refusal
        self._read_on()

    def _read_on(self) -> None:
        """Read on though requests wait, which uvicorn does not: behind them may come the client's end."""
        if self.pipeline:
            self.flow.resume_reading()

    def on_message_complete(self) -> None:
        """End a request; more may follow in what was received."""
        self._pending = 0
        if not self.parser.should_upgrade():  # else its body is still to come
            self._is_in_body = False
            super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers and tell the request that runs; uvicorn tells the last that came, which may be another."""
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._disarm()
        self._stop_timing_reader()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Stop writing, and time the client, which does not read."""
        super().pause_writing()
        self._time_reader(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Write on: the client reads."""
        super().resume_writing()
        self._stop_timing_reader()

    def _time_reader(self, num_waiting: int) -> None:
        self._reader_timer = self.loop.call_later(MAX_UNREAD_S, self._judge_reader, num_waiting)

    def _stop_timing_reader(self) -> None:
        if self._reader_timer is not None:
            self._reader_timer.cancel()
            self._reader_timer = None

    def _judge_reader(self, num_waiting: int) -> None:
        """Cut the client off if as many bytes wait for it as before."""
        now_waiting = self.transport.get_write_buffer_size()
        if now_waiting < num_waiting:
            self._time_reader(now_waiting)
        else:
            self.logger.warning("a client that does not read is cut off", extra={"waiting_bytes": now_waiting})
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """Answer what cannot be parsed, or exceeds the bounds, in the API's form of errors, and close."""
        error = self._refusal or BadRequestError(f"this is no HTTP request that can be read: {msg}")
        self.logger.warning("a request was refused before it was complete", extra={"reason": str(error)})
        if self.transport.is_closing() or self.pipeline or self._is_answered():
            self.transport.close()  # an answer would stand within another, or be taken for it
            return
        body = json.dumps(error.wire(uuid.uuid4().hex)).encode()
        status = f"{error.status} {HTTPStatus(error.status).phrase}"
        head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        self.transport.write(f"{head}connection: close\r\n\r\n".encode() + body)
        self._linger()

    def _is_answered(self) -> bool:
        """Whether an answer has begun that is not whole, or the answer to what comes is whole already."""
        if not self._has_cycle:
            return False
        return self._is_in_body if self.cycle.response_complete else self.cycle.response_started

    @property
    def _has_cycle(self) -> bool:
        return bool(self.cycle)  # None before the first request, which uvicorn's type does not say

    def _linger(self) -> None:
        """Say that this is the end, and read on for a while: closed with bytes unread, the answer would be lost."""
        self._is_refused = True
        if self._has_cycle:  # it may run, and nobody hears it
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self._disarm()
        self._timer = self.loop.call_later(LINGER_S, self._time_out)
        self.flow.resume_reading()
        self.transport.write_eof()

    def _discard(self, num_bytes: int) -> None:
        """Count bytes that nobody wants, and cut the client off that sends too many."""
        self._num_unwanted += num_bytes
        if self._num_unwanted > MAX_UNWANTED_BYTES:
            self.transport.abort()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        is_old = cycle.scope["http_version"] == "1.0"
        super()._start_asgi_task(cycle, _without_chunks(cycle, app) if is_old else app)

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


def _without_chunks(cycle: RequestResponseCycle, app: Any) -> Any:
    """Wrap an application: the end of an answer whose length it does not say is the end of the connection."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        is_open = False

        async def tell(message: Any) -> None:
            nonlocal is_open
            if message["type"] == "http.response.start":
                is_open = not any(name.lower() == b"content-length" for name, _ in message["headers"])
                cycle.chunked_encoding = False if is_open else None
            elif is_open:
                cycle.expected_content_length = len(message.get("body", b""))
            await send(message)

        await app(scope, receive, tell)

    return answer
