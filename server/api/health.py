"""Tell health to orchestrators, metrics to Prometheus, and the OpenAPI document to people."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import HTMLResponse, JSONResponse, Response

from server.api.answers import ErrorAnswer, LiveAnswer, NotReadyAnswer, ReadyAnswer
from server.api.deps import identify, only_operator, refuse_unknown_query, state_of
from server.api.docs_page import docs_page
from server.api.document import IDENTIFIED, errors, says, says_file
from server.state import ServerState

router = APIRouter(tags=["Operations"])
OPEN = [Depends(refuse_unknown_query)]
READY: dict[str, Any] = {
    "dependencies": OPEN,
    "responses": errors(422) | says(ReadyAnswer) | says(NotReadyAnswer, ErrorAnswer, status=503, description="Not now"),
}


@router.get("/health/live", dependencies=OPEN, responses=errors(422) | says(LiveAnswer))
async def live() -> Response:
    """Answer 200 while the API process runs."""
    return JSONResponse({"status": "live"})


@router.get("/health", name="health", **READY)
@router.get("/health/ready", **READY)
@router.get("/ping", name="ping", **READY)  # vLLM's and SageMaker's, as the next
@router.post("/ping", name="post_ping", **READY)
async def ready(request: Request) -> Response:
    """Answer 200 only while the engine, the registry and the store answer, and the server takes new work."""
    state = state_of(request)
    if (reason := _why_not_ready(state)) is not None:
        return JSONResponse({"status": "not ready", "reason": reason}, 503, {"Retry-After": "2"})
    told = state.uploads.require_ready()
    body: dict[str, Any] = {"status": "ready", "base": told.spec.name, "precision": told.precision}
    body |= {"load_seconds": round(told.load_seconds, 3), "imports_pending": state.imports.num_pending}
    if told.forward is not None:
        body["forward"] = msgspec.to_builtins(told.forward)
    return JSONResponse(body)


def _why_not_ready(state: ServerState) -> str | None:
    if state.is_draining:
        return "the server is stopping"
    if state.client.ready is None:
        return state.client.last_error or "the engine is starting"
    return state.stores.failure


@router.get(
    "/metrics",
    dependencies=[Depends(identify), Depends(only_operator), Depends(refuse_unknown_query)],
    response_class=Response,
    responses=errors(*IDENTIFIED, 422) | says_file("text/plain", "Metrics"),
)
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(state_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get(
    "/openapi.json",
    dependencies=[Depends(identify), Depends(refuse_unknown_query)],
    responses=errors(*IDENTIFIED, 422) | says(dict, description="The document"),
)
async def document(request: Request) -> Response:
    """The OpenAPI document of this server."""
    return JSONResponse(await asyncio.to_thread(request.app.openapi))


@router.get(
    "/docs", dependencies=OPEN, response_class=HTMLResponse, responses=errors(422) | says_file("text/html", "The page")
)
async def docs() -> Response:
    """The document, to read and try in a browser: the page asks for a key itself, since a browser sends none for it."""
    return docs_page()
