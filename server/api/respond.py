"""Answer a generation spec over HTTP, whole or as a stream, in the form of the route that was asked."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import Request
from starlette.responses import JSONResponse, Response

from server.api.disconnect import unless_disconnected
from server.api.sse import EventStream, EventStyle
from server.requests.answer import Generation
from server.requests.service import GenerationService
from server.requests.spec import GenerationSpec


class AnswerForm(EventStyle):
    """Writes answers as a route's JSON. One object serves one request: it may keep what earlier events said."""

    async def whole(self, generation: Generation) -> Any:
        """The body of a plain answer."""
        raise NotImplementedError

    def events(self, generation: Generation) -> AsyncGenerator[dict[str, Any]]:
        """The events of a stream, as they come."""
        raise NotImplementedError


async def respond(
    request: Request, service: GenerationService, spec: GenerationSpec, form: AnswerForm, is_stream: bool
) -> Response:
    """The response to a spec; the request's log line gets its task and usage.

    Raises `ServerError` for a failure before the first event, `ClientGoneError` if the client leaves before that.
    """
    generation = request.state.generation = service.run(spec)
    if is_stream:
        events = EventStream.begin(form.events(generation), request.state.request_id, form)
        return await unless_disconnected(request.receive, events)
    return JSONResponse(await unless_disconnected(request.receive, form.whole(generation)))
