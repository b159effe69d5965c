"""Tell health to orchestrators, metrics to Prometheus, and the OpenAPI document to people."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from server.api.deps import identify, only_operator, state_of
from server.state import ServerState

router = APIRouter()


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Answer 200 while the API process runs."""
    return {"status": "live"}


@router.get("/health")
@router.get("/health/ready")
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


@router.get("/metrics", dependencies=[Depends(identify), Depends(only_operator)])
async def metrics(request: Request) -> Response:
    """Metrics in Prometheus's text format."""
    return Response(state_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)


@router.get("/openapi.json", dependencies=[Depends(identify)])
async def document(request: Request) -> Response:
    """The OpenAPI document of this server."""
    return JSONResponse(request.app.openapi())


@router.get("/docs", dependencies=[Depends(identify)])
async def docs() -> Response:
    """The document, to read and try in a browser."""
    return get_swagger_ui_html(openapi_url="openapi.json", title="manyhats")
