"""Tell health to orchestrators, metrics to Prometheus, and the OpenAPI document to people."""

from __future__ import annotations

from typing import Any

import msgspec
from fastapi import APIRouter, Depends, Request
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from server.api.deps import identify, only_operator, state_of

router = APIRouter()


@router.get("/health/live")
async def live() -> dict[str, str]:
    """Answer 200 while the API process runs."""
    return {"status": "live"}


@router.get("/health")
@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """Answer 200 only while the engine answers and the server takes new work."""
    state, client = state_of(request), state_of(request).client
    if client.ready is None or state.is_draining:
        reason = "the server is stopping" if state.is_draining else client.last_error or "the engine is starting"
        status = {"status": "not ready", "reason": reason}
        return JSONResponse(status, 503, {"Retry-After": "2"})
    body: dict[str, Any] = {"status": "ready", "base": client.ready.spec.name, "precision": client.ready.precision}
    body |= {"load_seconds": round(client.ready.load_seconds, 3), "imports_pending": state.imports.num_pending}
    if client.ready.forward is not None:
        body["forward"] = msgspec.to_builtins(client.ready.forward)
    return JSONResponse(body)


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
