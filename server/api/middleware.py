"""Wrap every route: give the request its id and its line in the log, and write errors in one form."""

from __future__ import annotations

import logging
import re
import time
import uuid
from contextlib import ExitStack
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response
from starlette.routing import Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from adapters_store.errors import QuotaError, RegistryDownError, StoreDownError
from server.api.disconnect import ClientGoneError
from server.errors import (
    STORAGE_FAULTS,
    BadRequestError,
    ForbiddenError,
    InternalError,
    InvalidFieldError,
    MethodNotAllowedError,
    NotFoundError,
    RegistryUnavailableError,
    ServerError,
    StorageError,
    StoreUnavailableError,
    TenantLimitError,
)
from server.logs import cause_of

log = logging.getLogger(__name__)
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CLIENT_CLOSED_REQUEST = 499
OPENAI_PATHS = ("/v1/", "/tokenize", "/detokenize")  # whose errors clients of OpenAI's read
VERBS = ("GET", "POST", "PUT", "DELETE")
SEE_LOG = "the server failed; see its log"


class RequestLog:
    """Give each request its id, echo it, and log one line when it is over. No prompts, no keys."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request inside; see the class."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        is_head, scope = scope["method"] == "HEAD", _routed(scope)
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"], began, status = request_id, time.monotonic(), 0
        state["is_head"], state["until_answered"] = is_head, ExitStack()

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
                if scope["app"].state.server.is_draining:  # or the client's next request finds the connection closed
                    message["headers"].append((b"connection", b"close"))
            await send(message)

        try:
            await self.app(scope, receive, tell)
        except Exception as error:
            log.error("a request failed", exc_info=error, extra={"request_id": request_id})
            if status:  # the answer has begun: all that is left is to break it off
                raise
            await (await _server_error(Request(scope), InternalError(SEE_LOG)))(scope, receive, tell)
        finally:
            state["until_answered"].close()
            route = getattr(scope.get("route"), "path", "none")  # its pattern: no request can make a new one
            scope["app"].state.server.metrics.responses.labels(route, str(status or CLIENT_CLOSED_REQUEST)).inc()
            if not scope["path"].startswith(("/health", "/metrics", "/ping")):
                facts = {"request_id": request_id, "method": scope["method"], "path": scope["path"][:200]}
                timing = {"status": status, "seconds": round(time.monotonic() - began, 4)}
                log.info("request", extra={**facts, **timing, **_told(state)})


def _routed(scope: Scope) -> Scope:
    """The scope by which a request finds its route: HEAD is a GET whose body is not sent, a last slash is no matter."""
    path = scope["path"]
    return {
        **scope,
        "method": "GET" if scope["method"] == "HEAD" else scope["method"],
        "path": path[:-1] if path.endswith("/") and path != "/" else path,
    }


class CrossOrigin(CORSMiddleware):
    """Let web pages of the allowed origins ask, and read what an answer's headers say."""

    def __init__(self, app: ASGIApp, origins: list[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer a browser's question whether it may ask; a refusal has the form of errors."""
        allowed = super().preflight_response(request_headers)
        if allowed.status_code == 200:
            return allowed
        origin = request_headers["origin"][:200]
        error = ForbiddenError(f"the origin {origin} may not ask this: see --allowed-origins", "Origin")
        request_id = uuid.uuid4().hex
        return JSONResponse(error.wire(request_id), error.status, {"X-Request-Id": request_id, "Vary": "Origin"})


def _told(state: dict[str, Any]) -> dict[str, Any]:
    """The facts that the routes learned of a request: its task, its error, how many tokens."""
    facts = state["generation"].log_facts() if "generation" in state else {}
    return {"task": state.get("task"), "error": state.get("error"), **facts}


async def _server_error(request: Request, error: Exception) -> Response:
    known = error if isinstance(error, ServerError) else InternalError(SEE_LOG)
    if request.url.path.startswith(OPENAI_PATHS):
        known.as_openai()
    request.state.error = known.code
    if isinstance(known, TenantLimitError):
        metrics, tenant = request.app.state.server.metrics, request.scope["state"].get("tenant", "")
        metrics.tenant_refusals.labels(metrics.tenant_label(tenant), known.param or "storage").inc()
    headers = {} if known.retry_after is None else {"Retry-After": str(known.retry_after)}
    if known.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    is_text_generation = getattr(request.state, "is_text_generation", False)
    wire = known.text_generation_wire if is_text_generation else known.wire
    return JSONResponse(wire(request.state.request_id), known.status, headers)


async def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def _http_exception(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    path = request.url.path[:200]
    if status == 405:
        verbs = ", ".join(_verbs(request))
        message = f"{request.method[:20]} is not for {path}, which takes {verbs}: /docs shows every route"
        response = await _server_error(request, MethodNotAllowedError(message))
        response.headers["Allow"] = verbs
        return response
    if status == 404:
        return await _server_error(request, NotFoundError(f"there is nothing at {path}: /docs shows every route"))
    return await _server_error(request, BadRequestError(str(error)))


def _verbs(request: Request) -> list[str]:
    """The methods of all routes at a request's path, each of which may have another one."""
    scope, routes = request.scope, request.app.routes
    taken = [verb for verb in VERBS if any(one.matches({**scope, "method": verb})[0] is Match.FULL for one in routes)]
    return ["HEAD", *taken] if "GET" in taken else taken


async def _system(request: Request, error: Exception) -> Response:
    """Answer 507 for a disk that is full or fails; raise anything else, which is our bug."""
    if not isinstance(error, OSError) or error.errno not in STORAGE_FAULTS:
        raise error
    known = StorageError(f"the store cannot be read or written: {error.strerror}; nothing was changed")
    log.warning("the disk failed a request", extra=cause_of(error))
    return await _server_error(request, known)


async def _registry_down(request: Request, error: Exception) -> Response:
    log.warning("the registry failed a request", extra=cause_of(error))
    return await _server_error(request, RegistryUnavailableError(str(error), retry_after=2))


async def _store_down(request: Request, error: Exception) -> Response:
    log.warning("the store failed a request", extra=cause_of(error))
    return await _server_error(request, StoreUnavailableError(str(error), retry_after=2))


async def _validation(request: Request, error: Exception) -> Response:
    first = error.errors()[0] if isinstance(error, RequestValidationError) else {"loc": ("",), "msg": str(error)}
    field = str(first["loc"][-1])[:200]
    return await _server_error(request, InvalidFieldError(f"{field}: {first['msg']}", field))


async def _quota(request: Request, error: Exception) -> Response:
    return await _server_error(request, TenantLimitError(str(error)))


HANDLERS = {
    ServerError: _server_error,
    ClientGoneError: _client_gone,
    ClientDisconnect: _client_gone,
    HTTPException: _http_exception,
    RequestValidationError: _validation,
    OSError: _system,
    StoreDownError: _store_down,
    QuotaError: _quota,
    RegistryDownError: _registry_down,
}
