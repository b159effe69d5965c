"""Manage tenants, their keys and limits; show usage and the log of changes: for the operator, and a tenant's admins."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Depends, Query, Request
from pydantic import Field
from starlette.responses import JSONResponse, Response

from adapters_store.errors import NameTakenError
from adapters_store.registry import DEFAULT_TENANT
from adapters_store.registry.registry import UsageKey
from adapters_store.registry.tenants import Key, Tenant, TenantLimits
from server.api.body import read_json
from server.api.deps import (
    admit_unless_operator,
    caller_of,
    look_up,
    may,
    only_operator,
    refuse_unknown_query,
    state_of,
)
from server.api.document import COUNTED, GONE, HAS_BODY, errors, says
from server.api.tenant_answers import ChangesAnswer, KeysAnswer, NewKeyAnswer, TenantAnswer, TenantsAnswer, UsagesAnswer
from server.errors import ConflictError, ForbiddenError, NotFoundError
from server.requests.auth import ADMIN
from server.schemas import NAME_PATTERN, Strict, openapi_body
from server.state import ServerState

router = APIRouter(
    tags=["Tenants"],
    dependencies=[Depends(admit_unless_operator), Depends(may(ADMIN)), Depends(refuse_unknown_query)],
    responses=errors(*COUNTED, 422),
)
OPERATOR = [Depends(only_operator)]
DEFAULT_PAGE, MAX_PAGE = 100, 1000

TenantQuery = Annotated[str | None, Query(pattern=NAME_PATTERN)]
PageSize = Annotated[int, Query(ge=1, le=MAX_PAGE)]
AfterUsage = Annotated[str | None, Query(pattern=r"^[a-z0-9_-]{1,63}/[a-z0-9_-]{1,63}/[0-9]{1,9}$")]
Count = Annotated[int, Field(ge=0, le=2**53)]
Rate = Annotated[int, Field(ge=1, le=2**53)]


class LimitsBody(Strict):
    """A tenant's limits, all of them: one that is not given is no limit."""

    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    max_running: Rate | None = None
    max_queued: Rate | None = None
    max_adapters: Count | None = None
    max_bytes: Count | None = None
    share: float = Field(1.0, ge=0.001, le=1000)

    def limits(self) -> TenantLimits:
        """The limits as the registry has them."""
        return TenantLimits(**self.model_dump())


class TenantBody(Strict):
    """The body of POST /tenants."""

    name: str = Field(pattern=NAME_PATTERN)
    limits: LimitsBody = Field(default_factory=lambda: LimitsBody(share=1.0))


class KeyBody(Strict):
    """The body of POST /tenants/{tenant}/keys."""

    scopes: Annotated[list[Literal["generate", "deploy", "admin"]], Field(min_length=1, max_length=3)]
    note: str = Field("", max_length=200)


@router.post(
    "/tenants",
    status_code=201,
    dependencies=OPERATOR,
    openapi_extra=openapi_body(TenantBody),
    responses=says(TenantAnswer, status=201, description="Added") | errors(*HAS_BODY, 409),
)
async def add_tenant(request: Request) -> Response:
    """Add a tenant. A name is given once: that of a tenant which was deleted is refused, too."""
    state = _with_keys(request)
    asked = await read_json(request, TenantBody, state)
    try:
        tenant = await _changed(state, state.stores.tenants.add, asked.name, asked.limits.limits())
    except NameTakenError as error:
        raise ConflictError(str(error), "name") from None
    return JSONResponse(_tenant(tenant), 201)


@router.get("/tenants", responses=says(TenantsAnswer))
async def list_tenants(request: Request, limit: PageSize = DEFAULT_PAGE, after: TenantQuery = None) -> Response:
    """List a page of tenants by name, with their limits and what they hold; to a tenant's key its own alone.

    `next` is what to give as `after` for the next page, null at the end.
    """
    state, caller = state_of(request), caller_of(request)
    if caller.is_operator:
        found = await look_up(state, state.stores.tenants.all, after, limit + 1)
    else:
        found = [await look_up(state, state.stores.tenants.get, caller.tenant, param="tenant")]
    page = found[:limit]
    return JSONResponse({"tenants": list(map(_tenant, page)), "next": page[-1].name if len(found) > limit else None})


@router.delete("/tenants/{tenant}", status_code=204, dependencies=OPERATOR, responses=GONE | errors(409))
async def delete_tenant(request: Request, tenant: str) -> Response:
    """Delete a tenant with its keys, tasks and versions, for new requests at once; running ones finish.

    Usage stays for `--keep-audit-days`.
    """
    state = state_of(request)
    if tenant == DEFAULT_TENANT:
        raise ConflictError(f"the tenant {DEFAULT_TENANT} is always there", "tenant")
    await state.retention.retire(await _changed(state, state.stores.tenants.delete, tenant), tenant)
    return Response(status_code=204)


@router.put(
    "/tenants/{tenant}/limits",
    dependencies=OPERATOR,
    openapi_extra=openapi_body(LimitsBody),
    responses=says(TenantAnswer) | errors(*HAS_BODY),
)
async def set_limits(request: Request, tenant: str) -> Response:
    """Replace a tenant's limits, for new requests at once."""
    state = state_of(request)
    asked = await read_json(request, LimitsBody, state)
    return JSONResponse(_tenant(await _changed(state, state.stores.tenants.set_limits, tenant, asked.limits())))


@router.post(
    "/tenants/{tenant}/keys",
    status_code=201,
    openapi_extra=openapi_body(KeyBody),
    responses=says(NewKeyAnswer, status=201, description="Added") | errors(*HAS_BODY),
)
async def add_key(request: Request, tenant: str) -> Response:
    """Add a key to a tenant, with scopes that the caller has itself. `key` is shown here and never again."""
    state = _with_keys(request)
    _own(request, tenant)
    asked = await read_json(request, KeyBody, state)
    _refuse_wider(request, asked.scopes)
    key, sent = await _changed(state, state.stores.tenants.add_key, tenant, list(asked.scopes), asked.note)
    return JSONResponse(_key(key) | {"key": sent}, 201)


@router.get("/tenants/{tenant}/keys", responses=says(KeysAnswer))
async def list_keys(request: Request, tenant: str) -> Response:
    """List a tenant's keys, without their secrets."""
    state = state_of(request)
    _own(request, tenant)
    found = await look_up(state, state.stores.tenants.keys, tenant, param="tenant")
    return JSONResponse({"keys": [_key(key) for key in found]})


@router.post("/tenants/{tenant}/keys/{key_id}/rotate", responses=says(NewKeyAnswer))
async def rotate_key(request: Request, tenant: str, key_id: str) -> Response:
    """Replace the secret of a key; the new one is shown here and never again, the old one is no key any more."""
    state = state_of(request)
    _own(request, tenant)
    found = await look_up(state, state.stores.tenants.key, tenant, key_id, param="tenant")
    _refuse_wider(request, found.scopes)
    key, sent = await _changed(state, state.stores.tenants.rotate_key, tenant, key_id)
    return JSONResponse(_key(key) | {"key": sent})


@router.delete("/tenants/{tenant}/keys/{key_id}", status_code=204, responses=GONE)
async def revoke_key(request: Request, tenant: str, key_id: str) -> Response:
    """Revoke a key: within a second it is none; requests that run with it finish."""
    state = state_of(request)
    _own(request, tenant)
    await _changed(state, state.stores.tenants.revoke_key, tenant, key_id)
    return Response(status_code=204)


@router.get("/usage", responses=says(UsagesAnswer))
async def usage(
    request: Request, tenant: TenantQuery = None, limit: PageSize = MAX_PAGE, after: AfterUsage = None
) -> Response:
    """Show a page of usage by tenant, task and version (0: the base); to a tenant's key its own.

    `next` is what to give as `after` for the next page, null at the end.
    """
    state = state_of(request)
    chosen = _chosen(request, tenant)
    await state.usage.wait_until_durable(state.stores)
    found = await look_up(state, state.stores.registry.usages, chosen, _usage_key(after), limit + 1)
    rows = [{"tenant": name} | msgspec.to_builtins(one) for name, one in found[:limit]]
    last = "{tenant}/{task}/{version}".format(**rows[-1]) if len(found) > limit else None
    return JSONResponse({"usage": rows, "next": last})


@router.get("/audit", responses=says(ChangesAnswer))
async def audit(
    request: Request,
    tenant: TenantQuery = None,
    before: Annotated[int | None, Query(ge=1, lt=2**31)] = None,
    limit: PageSize = DEFAULT_PAGE,
) -> Response:
    """List changes, the newest first: who, what, when, in which request; `before` is a `number`, for the next page."""
    state = state_of(request)
    chosen = _chosen(request, tenant)
    found = await look_up(state, state.stores.tenants.changes, chosen, before, limit)
    return JSONResponse({"changes": [msgspec.to_builtins(entry) for entry in found]})


def _usage_key(after: str | None) -> UsageKey | None:
    if after is None:
        return None
    tenant, task, version = after.split("/")
    return tenant, task, int(version)


async def _changed(state: ServerState, call: Any, tenant: str, *arguments: object) -> Any:
    """The result of a change of a tenant; the next request sees it."""
    result = await look_up(state, call, tenant, *arguments, param="tenant")
    state.callers.clear_cache(tenant)
    return result


def _with_keys(request: Request) -> ServerState:
    """The server's rooms. Raises `ForbiddenError` if it asks for no keys: others would be let in, too."""
    state = state_of(request)
    if not state.callers.asks_for_keys:
        raise ForbiddenError(
            f"this server asks for no key and has the one tenant {DEFAULT_TENANT}: start it with MANYHATS_ADMIN_KEY"
        )
    return state


def _own(request: Request, tenant: str) -> None:
    """Raise `NotFoundError` for another tenant than the key's own: to it every other one is absent."""
    caller = caller_of(request)
    if not caller.is_operator and tenant != caller.tenant:
        raise NotFoundError(f"there is no tenant {tenant[:63]}", "tenant")


def _refuse_wider(request: Request, scopes: Iterable[str]) -> None:
    """Raise `ForbiddenError` if a secret of these scopes would open more than the caller's own key does."""
    scopes_of_caller = caller_of(request).scopes
    if wider := sorted(set(scopes) - scopes_of_caller):
        has = ", ".join(sorted(scopes_of_caller))
        raise ForbiddenError(f"a key with the scope {wider[0]} is given out by one that has it; this key has: {has}")


def _chosen(request: Request, tenant: str | None) -> str | None:
    """The tenant to show; None is all of them, which only the operator may see. Raises `NotFoundError`."""
    caller = caller_of(request)
    if not caller.is_operator:
        _own(request, tenant or caller.tenant)
        return caller.tenant
    return tenant or (caller.tenant if "x-tenant" in request.headers else None)


def _tenant(tenant: Tenant) -> dict[str, Any]:
    limits = {name: getattr(tenant.limits, name) for name in TenantLimits.__struct_fields__}
    holds = {"num_adapters": tenant.num_adapters, "bytes": tenant.num_bytes}
    return {"name": tenant.name, "created": tenant.created, "limits": limits, **holds}


def _key(key: Key) -> dict[str, Any]:
    return {"id": key.id, "tenant": key.tenant, "scopes": list(key.scopes), "note": key.note, "created": key.created}
