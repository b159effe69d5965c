"""The composition root: every room is made here, given what it needs, and put behind the routes."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters_store.blobs import Blobs
from adapters_store.registry import Registry
from server.api import adapters, generate, health, openai, tasks
from server.api.front import Front
from server.api.generation import ClientGoneError
from server.api.imports import import_tree
from server.api.text import Tokenizer
from server.engine.client import EngineClient, EngineStartError, ProcessEngineClient
from server.engine.messages import EngineConfig
from server.errors import (
    BadRequestError,
    InternalError,
    InvalidFieldError,
    MethodNotAllowedError,
    NotFoundError,
    ServerError,
)
from server.metrics import Metrics
from server.settings import Settings

log = logging.getLogger(__name__)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_CLOSED_REQUEST = 499
OnReady = Callable[[Front], None]


def engine_config(settings: Settings, base_folder: Path) -> EngineConfig:
    """What the engine is told."""
    return EngineConfig(
        folder=str(base_folder),
        name=settings.base,
        blobs=str(settings.data / "artifacts"),
        precision=settings.precision,
        device=settings.device,
        num_threads=settings.num_threads,
        kv_cache_bytes=int(settings.kv_cache_bytes),
        block_size=settings.block_size,
        max_sequence_tokens=settings.max_sequence_tokens,
        max_batch_tokens=settings.max_batch_tokens,
        max_running=settings.max_running,
        max_waiting=settings.max_waiting,
        slot_bytes=int(settings.slot_bytes),
        host_bytes=int(settings.host_bytes),
        is_prefix_cached=settings.prefix_cache,
    )


def create_app(
    settings: Settings, base_folder: Path, client: EngineClient | None = None, on_ready: OnReady = lambda _front: None
) -> FastAPI:
    """The application. `client` is the engine (by default a process of its own); `on_ready` is called before serving.

    Where it cannot start, `state.start_failure` is a sentence for the operator.
    """
    engine = client or ProcessEngineClient(engine_config(settings, base_folder))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            front = await _open(settings, base_folder, engine)
        except (EngineStartError, OSError) as error:
            app.state.start_failure = str(error)
            raise
        app.state.front = front
        flusher = asyncio.create_task(front.usage.keep_flushing(front.registry))
        try:
            on_ready(front)
            yield
        finally:
            flusher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await flusher
            await engine.close()
            await asyncio.to_thread(front.usage.flush, front.registry)
            front.registry.close()

    app = FastAPI(title="manyhats", summary="One frozen base model, many hats", lifespan=lifespan)
    app.state.start_failure = None
    for room in (generate, openai, adapters, tasks, health):
        app.include_router(room.router)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    app.add_middleware(RequestLog)
    return app


async def _open(settings: Settings, base_folder: Path, engine: EngineClient) -> Front:
    settings.data.mkdir(parents=True, exist_ok=True)
    registry = Registry(f"sqlite:///{settings.data / 'registry.db'}").open()
    blobs = Blobs(settings.data / "artifacts")
    blobs.sweep(registry.digests())
    starting = asyncio.create_task(engine.start())
    tokenizer = await asyncio.to_thread(Tokenizer, base_folder)  # while the engine loads its base
    await starting
    metrics = Metrics(lambda: engine.stats, lambda: getattr(engine, "pid", None))
    front = Front(settings, engine, registry, blobs, tokenizer, metrics)
    if settings.import_ is not None:
        await import_tree(front, settings.import_)
    return front


class RequestLog:
    """Give each request its id, echo it, and log one line when it is over. No prompts, no keys."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See the class."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], began, status = request_id, time.monotonic(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, tell)
        finally:
            if not scope["path"].startswith(("/health", "/metrics")):
                facts = {"request_id": request_id, "method": scope["method"], "path": scope["path"][:200]}
                timing = {"status": status, "seconds": round(time.monotonic() - began, 4)}
                log.info("request", extra={**facts, **timing, "task": state.get("task")})


def _request_id(request: Request) -> str:
    return str(getattr(request.state, "request_id", ""))


async def _server_error(request: Request, error: Exception) -> Response:
    known = error if isinstance(error, ServerError) else InternalError("the server failed; see its log")
    headers = {} if known.retry_after is None else {"Retry-After": str(known.retry_after)}
    if known.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(known.wire(_request_id(request)), known.status, headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("a request failed", exc_info=error, extra={"request_id": _request_id(request)})
    return await _server_error(request, error)


async def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    path = request.url.path[:200]
    if status == 405:
        return await _server_error(request, MethodNotAllowedError(f"{request.method} is not for {path}"))
    if status == 404:
        return await _server_error(request, NotFoundError(f"there is nothing at {path}"))
    return await _server_error(request, BadRequestError(str(error)))


async def _validation(request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": ("",), "msg": str(error)}
    field = str(first["loc"][-1])[:200]
    return await _server_error(request, InvalidFieldError(f"{field}: {first['msg']}", field))


HANDLERS = {
    ServerError: _server_error,
    ClientGoneError: _client_gone,
    HTTPException: _http_exception,
    RequestValidationError: _validation,
    Exception: _unexpected,
}
