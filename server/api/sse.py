"""Send server-sent events, and end them as soon as their reader leaves."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any, Self

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.api.disconnect import ClientGoneError, unless_disconnected
from server.errors import InternalError, ServerError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
Event = dict[str, Any]


class EventStyle:
    """Writes the events of a stream: each as `data: {...}`, an error as an event `error`, and at the end [DONE].

    Dialects that write them otherwise override these.
    """

    end = DONE

    def written(self, event: Event) -> bytes:
        """An event as it is sent."""
        return data_line(event)

    def failure(self, error: ServerError, request_id: str) -> bytes:
        """The error that ends a stream."""
        return b"event: error\n" + data_line(error.wire(request_id))


class EventStream(Response):
    """Sends each object as an event in a style, then the style's end.

    An error after the first byte is an event of its own, and the last. The events are closed as soon as the
    client leaves: Starlette's own response does not watch for that while nothing is sent. JSON is written in ASCII,
    because clients that split text into lines would split at U+0085, U+2028 and their like.
    """

    media_type = "text/event-stream"

    def __init__(self, first: Event | None, rest: AsyncGenerator[Event], request_id: str, style: EventStyle) -> None:
        self.first, self.rest, self.request_id, self.style = first, rest, request_id, style
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    @classmethod
    async def begin(cls, events: AsyncGenerator[Event], request_id: str, style: EventStyle) -> Self:
        """The response, once the first event has come: an error before it is raised here, as an ordinary answer."""
        return cls(await anext(events, None), events, request_id, style)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client has gone."""
        try:
            with contextlib.suppress(ClientGoneError, OSError):  # nobody reads on
                await unless_disconnected(receive, self._write(scope, send))
        finally:
            await self.rest.aclose()

    async def _write(self, scope: Scope, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        end = self.style.end
        try:
            if self.first is not None:
                await self._send(send, self.style.written(self.first))
            async for event in self.rest:
                await self._send(send, self.style.written(event))
        except ServerError as error:
            end = self._error(scope, error)
        except Exception:
            log.exception("a stream failed", extra={"request_id": self.request_id})
            end = self._error(scope, InternalError("the server failed while it answered"))
        await self._send(send, end)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})

    def _error(self, scope: Scope, error: ServerError) -> bytes:
        scope.setdefault("state", {})["error"] = error.code
        return self.style.failure(error, self.request_id)


def data_line(event: Event) -> bytes:
    """An object as the data of an event."""
    return b"data: " + json.dumps(event, allow_nan=False).encode() + b"\n\n"
