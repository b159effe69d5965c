"""Dependencies of the routes: who calls, and whether they may."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute

from adapters_store.registry.audit import act_as
from server.errors import DrainingError, ForbiddenError, InvalidFieldError
from server.requests.auth import Caller
from server.state import ServerState


def state_of(request: Request) -> ServerState:
    """The front that the application was made with."""
    state: ServerState = request.app.state.server
    return state


async def identify(request: Request) -> None:
    """What every route but health depends on: sets who calls, and for which tenant, before anything else is looked at.

    Raises `ForbiddenError`, `UnauthorizedError`, `NotFoundError` for a tenant that is absent, or `DrainingError` but to
    who only looks.
    """
    state, headers = state_of(request), request.headers
    state.callers.check_origin(headers.get("host"), headers.get("origin"))
    caller = await state.callers.identify(headers.get("authorization", ""), headers.get("x-tenant"))
    act_as(caller.name, request.state.request_id)
    if state.is_draining and request.method != "GET":
        raise DrainingError("the server is stopping: ask again in a moment", retry_after=5)
    request.state.caller, request.state.tenant = caller, caller.tenant


async def admit(request: Request) -> None:
    """What every route of a tenant's own things depends on: as `identify`, and a request of the tenant is counted.

    Raises what `identify` raises, and `TenantLimitError`.
    """
    await identify(request)
    caller = caller_of(request)
    state_of(request).rate_limiter.count_request(caller.tenant, caller.limits)


def may(scope: str, looking: bool = False) -> Callable[[Request], Coroutine[Any, Any, None]]:
    """A dependency behind `admit` or `identify`: the key has this scope. With `looking` GET needs none."""

    async def check(request: Request) -> None:
        caller = caller_of(request)
        if scope not in caller.scopes and not (looking and request.method == "GET"):
            has = ", ".join(sorted(caller.scopes))
            raise ForbiddenError(f"this needs a key with the scope {scope}; this key has: {has}")

    return check


async def only_operator(request: Request) -> None:
    """A dependency behind `identify`: the admin key, or no key where none is asked for. Raises `ForbiddenError`."""
    if not caller_of(request).is_operator:
        raise ForbiddenError("this needs the server's admin key")


async def refuse_unknown_query(request: Request) -> None:
    """A parameter that a route does not know, or that is there twice, would be ignored in silence.

    Raises `InvalidFieldError`.
    """
    route: APIRoute = request.scope["route"]
    known = {parameter.alias for parameter in route.dependant.query_params}
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in known:
            said = ", ".join(sorted(known)) or "none"
            raise InvalidFieldError(f"unknown query parameter {name[:200]}; this route has: {said}", name[:200])
        if count > 1:
            raise InvalidFieldError(f"the query parameter {name} is there {count} times", name)


def tenant_of(request: Request) -> str:
    """Who asks, as `admit` found it."""
    tenant: str = request.state.tenant
    return tenant


def caller_of(request: Request) -> Caller:
    """Who calls, as `identify` found it."""
    caller: Caller = request.state.caller
    return caller
