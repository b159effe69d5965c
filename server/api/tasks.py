"""Show tasks and their versions, route requests to them, pin, delete and download them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from adapters_store.errors import NoEarlierRouteError
from adapters_store.format.archive import ZIP_TYPE
from adapters_store.registry.registry import Task, Usage, Version
from adapters_store.registry.routes import Route
from server.api.body import read_json
from server.api.deps import admit, look_up, may, refuse_unknown_query, state_of, tenant_of
from server.errors import ConflictError, InvalidFieldError
from server.requests.auth import DEPLOY
from server.schemas import BASE, PinRequest, RouteRequest, identity, openapi_body
from server.state import ServerState

router = APIRouter(dependencies=[Depends(admit), Depends(may(DEPLOY, looking=True)), Depends(refuse_unknown_query)])


@router.get("/tasks")
async def list_tasks(request: Request) -> Response:
    """List all tasks of the tenant, and the base."""
    state, tenant = state_of(request), tenant_of(request)
    found = await asyncio.to_thread(state.registry.tasks, tenant)
    look = await _look(state, tenant)
    return JSONResponse({"tasks": [_base(look.used), *(_task(task, look) for task in found)]})


@router.get("/tasks/{task}")
async def get_task(request: Request, task: str) -> Response:
    """Show one task: versions, route, residency, use."""
    state, tenant = state_of(request), tenant_of(request)
    if task == BASE:
        return JSONResponse(_base(await asyncio.to_thread(state.registry.usage, tenant)))
    return JSONResponse(await _shown(state, tenant, task))


async def _shown(state: ServerState, tenant: str, task: str) -> dict[str, Any]:
    found = await look_up(state.registry.task, tenant, task)
    return _task(found, await _look(state, tenant))


@router.put("/tasks/{task}/route", openapi_extra=openapi_body(RouteRequest))
async def put_route(request: Request, task: str) -> Response:
    """Share requests out among versions by weight, from the next request on; running ones are not touched.

    With `sticky: "user"`, requests of the same `user` get the same version.
    """
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "routed")
    asked = await read_json(request, RouteRequest, state.settings)
    route = Route({int(number): weight for number, weight in asked.versions.items()}, asked.sticky)
    await look_up(state.registry.set_route, tenant, task, route)
    return await _changed(state, tenant, task)


@router.post("/tasks/{task}/rollback")
async def roll_back(request: Request, task: str) -> Response:
    """Restore the route before this one, less versions deleted since; asked again, the one before that."""
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "routed")
    try:
        await look_up(state.registry.roll_back, tenant, task)
    except NoEarlierRouteError as error:
        raise ConflictError(str(error), "task") from None
    return await _changed(state, tenant, task)


@router.put("/tasks/{task}/pin", openapi_extra=openapi_body(PinRequest))
async def put_pin(request: Request, task: str) -> Response:
    """Keep the versions that the task routes to on the device, or not."""
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "pinned: it is always there")
    asked = await read_json(request, PinRequest, state.settings)
    await look_up(state.registry.set_pinned, tenant, task, asked.pinned)
    return await _changed(state, tenant, task)


async def _changed(state: ServerState, tenant: str, task: str) -> Response:
    await state.retention.sync_pinned()
    return JSONResponse(await _shown(state, tenant, task))


@router.delete("/tasks/{task}", status_code=204)
async def delete_task(request: Request, task: str) -> Response:
    """Delete a task: new requests get 404 at once; running ones finish with the version that they began with."""
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "deleted")
    digests = await look_up(state.registry.delete_task, tenant, task)
    await state.retention.sync_pinned()
    await state.retention.mark_for_deletion(digests)
    return Response(status_code=204)


@router.delete("/tasks/{task}/versions/{number}", status_code=204)
async def delete_version(request: Request, task: str, number: int) -> Response:
    """Delete a version, also from the route: new requests do not get it; running ones finish."""
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "deleted")
    digest = await look_up(state.registry.delete_version, tenant, task, number)
    await state.retention.sync_pinned()
    await state.retention.mark_for_deletion([digest])
    return Response(status_code=204)


@router.get("/tasks/{task}/versions/{number}/artifact", dependencies=[Depends(may(DEPLOY))])
async def get_artifact(request: Request, task: str, number: int) -> Response:
    """Download a version's PEFT folder as a zip."""
    digest, body = await state_of(request).uploads.download(tenant_of(request), task, number)
    headers = {"Content-Disposition": f'attachment; filename="{task}-{number}.zip"', "ETag": f'"{digest}"'}
    return Response(body, media_type=ZIP_TYPE, headers=headers)


def _refuse_base(task: str, what: str) -> None:
    if task == BASE:
        raise InvalidFieldError(f"the base cannot be {what}", "task")


def _base(used: list[Usage]) -> dict[str, Any]:
    return {"task": BASE, "versions": [], "route": _route(Route()), "use": _use(used, BASE, 0)}


@dataclass(frozen=True)
class Look:
    """Facts of a tenant's versions beside the registry: where each digest is, and how much it was used."""

    state: ServerState
    tenant: str
    used: list[Usage]
    where: dict[str, str]


async def _look(state: ServerState, tenant: str) -> Look:
    used = await asyncio.to_thread(state.registry.usage, tenant)
    return Look(state, tenant, used, await state.client.residency())


def _task(task: Task, look: Look) -> dict[str, Any]:
    return {
        "task": task.name,
        "versions": [_version(version, look) for version in task.versions],
        "route": _route(task.route),
        "pinned": task.is_pinned,
    }


def _route(route: Route) -> dict[str, Any]:
    return {
        "versions": {str(number): weight for number, weight in sorted(route.weights.items())},
        "sticky": route.sticky,
    }


def _version(version: Version, look: Look) -> dict[str, Any]:
    return {
        **identity(version, look.state.uploads.item_bytes),
        "note": version.note,
        "created": version.created,
        "residency": _residency(version.digest, look),
        "use": _use(look.used, version.task, version.number),
        "recent": look.state.recent.summary((look.tenant, version.task, version.number)),
    }


def _residency(digest: str, look: Look) -> str:
    return "quarantined" if look.state.revalidation.is_quarantined(digest) else look.where.get(digest, "disk")


def _use(used: list[Usage], task: str, number: int) -> dict[str, int]:
    for usage in used:
        if (usage.task, usage.version) == (task, number):
            counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
            return {"requests": usage.requests, **counts}
    return {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
