"""Health for whoever watches, and metrics for Prometheus."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import JSONResponse, Response

from server.api.front import front_of, tenant_of

router = APIRouter()


@router.get("/health/live")
async def live() -> dict[str, str]:
    """200 while the front process answers."""
    return {"status": "live"}


@router.get("/health/ready")
async def ready(request: Request) -> Response:
    """200 only while the engine answers."""
    client = front_of(request).client
    if client.ready is None:
        status = {"status": "not ready", "reason": client.last_error or "the engine is starting"}
        return JSONResponse(status, 503, {"Retry-After": "2"})
    body = {"status": "ready", "base": client.ready.name, "precision": client.ready.precision}
    return JSONResponse(body | {"load_seconds": round(client.ready.load_seconds, 3)})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus's text format."""
    tenant_of(request)
    return Response(front_of(request).metrics.render(), media_type=CONTENT_TYPE_LATEST)
