"""Server-sent events that end when their reader does."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from server.errors import InternalError, ServerError

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends each object as `data: {...}`, then `data: [DONE]`.

    An error after the first byte is an event `error` and the end, without [DONE]. The events' iterator is closed as
    soon as the client leaves: Starlette's own response does not watch for that while nothing is sent.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], request_id: str) -> None:
        self.events, self.request_id = events, request_id
        self.status_code = 200
        self.background: BackgroundTask | None = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events end or the client has gone."""
        writer, gone = asyncio.create_task(self._write(send)), asyncio.create_task(_disconnect(receive))
        try:
            await asyncio.wait({writer, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for side in (writer, gone):
                side.cancel()
            await asyncio.gather(writer, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        end = DONE
        try:
            async with aclosing(self.events) as events:  # type: ignore[type-var]
                async for event in events:
                    await self._send(send, b"data: " + json.dumps(event, ensure_ascii=False).encode() + b"\n\n")
        except ServerError as error:
            end = self._error(error)
        except Exception:
            log.exception("a stream failed", extra={"request_id": self.request_id})
            end = self._error(InternalError("the server failed while it answered"))
        await self._send(send, end)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, body: bytes) -> None:
        await send({"type": "http.response.body", "body": body, "more_body": True})

    def _error(self, error: ServerError) -> bytes:
        return b"event: error\ndata: " + json.dumps(error.wire(self.request_id)).encode() + b"\n\n"


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def begun(events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """The same events, after the first has come: an error before it is raised here, as an ordinary answer."""
    first = await anext(events, None)

    async def rest() -> AsyncIterator[dict[str, Any]]:
        async with aclosing(events):  # type: ignore[type-var]
            if first is not None:
                yield first
            async for event in events:
                yield event

    return rest()
