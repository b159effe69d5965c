"""Dependencies of the routes: identify the caller, count the request, check scopes and query parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request, Security
from fastapi.params import Depends as Dependant
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from adapters_store.registry.audit import act_as
from server.errors import DrainingError, ForbiddenError, InvalidFieldError, absent_is_404
from server.requests.auth import Caller
from server.state import ServerState
from server.threads import work_for

T = TypeVar("T")
BEARER = HTTPBearer(
    auto_error=False,  # `identify` reads the key; here it is described
    scheme_name="key",
    description="The admin key, or a tenant's key. A server without an admin key asks for none.",
)
KeySent = Annotated[HTTPAuthorizationCredentials | None, Security(BEARER)]
TenantSent = Annotated[
    str | None, Header(alias="X-Tenant", description="The tenant that the admin key acts for, else `default`")
]


def state_of(request: Request) -> ServerState:
    """The server's rooms, as the application was made with them."""
    state: ServerState = request.app.state.server
    return state


async def identify(request: Request, _key: KeySent = None, _tenant: TenantSent = None) -> None:
    """Set the request's caller and tenant; every route but health and /docs depends on it, before all else.

    Until its answer is whole, what is deleted of the tenant is known to be in use.

    Raises `ForbiddenError`, `UnauthorizedError`, `NotFoundError` for an absent tenant, and `DrainingError` unless
    the request is a GET.
    """
    state, headers = state_of(request), request.headers
    state.callers.check_origin(headers.get("host"), headers.get("origin"))
    caller = await state.callers.identify(headers.get("authorization", ""), headers.get("x-tenant"))
    request.state.until_answered.enter_context(state.retention.memories.in_flight(caller.tenant))
    act_as(caller.name, request.state.request_id)
    work_for(caller.tenant)
    if state.is_draining and request.method != "GET":
        raise DrainingError("the server is stopping: ask again in a moment", retry_after=5)
    request.state.caller, request.state.tenant = caller, caller.tenant


Identified = Annotated[None, Depends(identify)]


async def admit(request: Request, _identified: Identified) -> None:
    """Identify the caller and count a request of its tenant; every route of a tenant's own things depends on it.

    A GET is counted apart: whoever watches tasks is not refused a generation for it. Raises the errors of `identify`,
    and `TenantLimitError`.
    """
    caller = caller_of(request)
    state_of(request).rate_limiter.count_request(caller.tenant, caller.limits, request.method == "GET")


async def admit_unless_operator(request: Request, _identified: Identified) -> None:
    """Identify the caller, and count the request as `admit` does if it is a tenant's: making keys costs, too."""
    if not (caller := caller_of(request)).is_operator:
        state_of(request).rate_limiter.count_request(caller.tenant, caller.limits, request.method == "GET")


def may(scope: str, looking: bool = False) -> Callable[[Request], Coroutine[Any, Any, None]]:
    """Make a dependency that raises `ForbiddenError` unless the key has a scope. With `looking` GET needs none.

    It stands behind `admit` or `identify`.
    """

    async def check(request: Request) -> None:
        caller = caller_of(request)
        if scope not in caller.scopes and not (looking and request.method == "GET"):
            has = ", ".join(sorted(caller.scopes))
            raise ForbiddenError(f"this needs a key with the scope {scope}; this key has: {has}")

    return check


async def only_operator(request: Request) -> None:
    """Raise `ForbiddenError` unless the caller is the operator: the admin key, or anyone here if no keys are asked for.

    It stands behind `identify`.
    """
    if not caller_of(request).is_operator:
        raise ForbiddenError("this needs the server's admin key")


async def refuse_unknown_query(request: Request) -> None:
    """Raise `InvalidFieldError` for a query parameter that the route does not know, or that is given twice.

    Otherwise it would be ignored in silence.
    """
    route: APIRoute = request.scope["route"]
    known = {parameter.alias for parameter in route.dependant.query_params}
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in known:
            said = ", ".join(sorted(known)) or "none"
            raise InvalidFieldError(f"unknown query parameter {name[:200]}; this route has: {said}", name[:200])
        if count > 1:
            raise InvalidFieldError(f"the query parameter {name} is there {count} times", name)


def counted_callers(scope: str, looking: bool = False) -> list[Dependant]:
    """List the dependencies of routes for callers with a scope, who are counted; with `looking` GET needs no scope."""
    return [Depends(admit), Depends(may(scope, looking)), Depends(refuse_unknown_query)]


def tenant_of(request: Request) -> str:
    """The tenant that the request is for, as `identify` set it."""
    tenant: str = request.state.tenant
    return tenant


def caller_of(request: Request) -> Caller:
    """The caller, as `identify` set it."""
    caller: Caller = request.state.caller
    return caller


async def look_up(state: ServerState, call: Callable[..., T], *args: object, param: str = "task") -> T:
    """The result of a blocking call of the registry. Raises `NotFoundError` of `param` if absent."""
    with absent_is_404(param):
        return await state.stores.database.call(call, *args)
