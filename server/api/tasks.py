"""Show tasks and their versions, route requests to them, pin, delete and download them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from adapters_store.base.spec import ItemBytes
from adapters_store.errors import NoEarlierRouteError
from adapters_store.format.archive import ZIP_TYPE
from adapters_store.registry.registry import Task, Usage, Version
from adapters_store.registry.routes import Route
from server.api.answers import BaseTaskAnswer, TaskAnswer, TasksAnswer
from server.api.body import read_json
from server.api.deps import counted_callers, look_up, may, state_of, tenant_of
from server.api.document import COUNTED, GONE, HAS_BODY, errors, says, says_file
from server.api.zip_stream import ZipStream
from server.errors import ConflictError, InvalidFieldError
from server.requests.auth import DEPLOY
from server.requests.version_stats import RequestOutcome, summary
from server.schemas import BASE, NAME_PATTERN, PinRequest, RouteRequest, identity, openapi_body
from server.state import ServerState

DEFAULT_PAGE, MAX_PAGE = 100, 200  # tasks of a list, versions of a task
MAX_BRIEF = 20  # versions of a task in a list of tasks, beside those of its route
RESIDENCY_WITHIN_S = 2.0
PageSize = Annotated[int, Query(ge=1, le=MAX_PAGE)]
AfterName = Annotated[str | None, Query(pattern=NAME_PATTERN)]
BeforeNumber = Annotated[int | None, Query(ge=1, lt=2**63)]

router = APIRouter(
    tags=["Adapters and tasks"],
    dependencies=counted_callers(DEPLOY, looking=True),
    responses=errors(*COUNTED, 422),
)


@router.get("/tasks", responses=says(TasksAnswer))
async def list_tasks(request: Request, limit: PageSize = DEFAULT_PAGE, after: AfterName = None) -> Response:
    """List a page of the tenant's tasks by name, after the base; each with its route, and its newest versions beside.

    `next` is what to give as `after` for the next page, null at the end.
    """
    state, tenant = state_of(request), tenant_of(request)
    found = await look_up(state, state.stores.registry.tasks, tenant, after, limit + 1, MAX_BRIEF)
    page = found[:limit]
    look = await _look(state, tenant, page)
    head = [_base(look)] if after is None else []
    shown = await state.tenant_work.run(lambda: head + [_task(task, look) for task in page])
    return JSONResponse({"tasks": shown, "next": page[-1].name if len(found) > limit else None})


@router.get("/tasks/{task}", responses=says(TaskAnswer, BaseTaskAnswer))
async def get_task(
    request: Request, task: str, limit: PageSize = DEFAULT_PAGE, before: BeforeNumber = None
) -> Response:
    """Show one task: route, residency, use, and a page of its versions: the newest, or those before a number.

    The versions of the route are always there. `num_versions` is how many there are in all.
    """
    state, tenant = state_of(request), tenant_of(request)
    if task == BASE:
        return JSONResponse(_base(await _look(state, tenant, [])))
    return JSONResponse(await _shown(state, tenant, task, before, limit))


async def _shown(
    state: ServerState, tenant: str, task: str, before: int | None = None, limit: int = DEFAULT_PAGE
) -> dict[str, Any]:
    found = await look_up(state, state.stores.registry.task, tenant, task, before, limit)
    look = await _look(state, tenant, [found])
    return await state.tenant_work.run(_task, found, look)


@router.put(
    "/tasks/{task}/route", openapi_extra=openapi_body(RouteRequest), responses=says(TaskAnswer) | errors(*HAS_BODY)
)
async def put_route(request: Request, task: str) -> Response:
    """Share requests out among versions by weight, from the next request on; running ones are not touched.

    With `sticky: "user"`, requests of the same `user` get the same version.
    """
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "routed")
    asked = await read_json(request, RouteRequest, state)
    route = Route({int(number): weight for number, weight in asked.versions.items()}, asked.sticky)
    await look_up(state, state.stores.registry.set_route, tenant, task, route)
    return await _changed(state, tenant, task)


@router.post("/tasks/{task}/rollback", responses=says(TaskAnswer) | errors(409))
async def roll_back(request: Request, task: str) -> Response:
    """Restore the route before this one, less versions deleted since; asked again, the one before that."""
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "routed")
    try:
        await look_up(state, state.stores.registry.roll_back, tenant, task)
    except NoEarlierRouteError as error:
        raise ConflictError(str(error), "task") from None
    return await _changed(state, tenant, task)


@router.put("/tasks/{task}/pin", openapi_extra=openapi_body(PinRequest), responses=says(TaskAnswer) | errors(*HAS_BODY))
async def put_pin(request: Request, task: str) -> Response:
    """Keep the versions that the task routes to on the device, or not."""
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "pinned: it is always there")
    asked = await read_json(request, PinRequest, state)
    await look_up(state, state.stores.registry.set_pinned, tenant, task, asked.pinned)
    return await _changed(state, tenant, task)


async def _changed(state: ServerState, tenant: str, task: str) -> Response:
    await state.retention.sync_pinned()
    return JSONResponse(await _shown(state, tenant, task))


@router.delete("/tasks/{task}", status_code=204, responses=GONE)
async def delete_task(request: Request, task: str) -> Response:
    """Delete a task: new requests get 404 at once; running ones finish with the version that they began with."""
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "deleted")
    await end_task(state, tenant, task)
    return Response(status_code=204)


async def end_task(state: ServerState, tenant: str, task: str) -> None:
    """Delete a task with all its versions, from every room. Raises `NotFoundError`."""
    digests = await look_up(state, state.stores.registry.delete_task, tenant, task)
    await state.retention.retire(digests, tenant, task)


@router.delete("/tasks/{task}/versions/{number}", status_code=204, responses=GONE)
async def delete_version(request: Request, task: str, number: int) -> Response:
    """Delete a version, also from the route: new requests do not get it; running ones finish."""
    state, tenant = state_of(request), tenant_of(request)
    _refuse_base(task, "deleted")
    digest = await look_up(state, state.stores.registry.delete_version, tenant, task, number)
    await state.retention.retire([digest], tenant, task, number)
    return Response(status_code=204)


@router.get(
    "/tasks/{task}/versions/{number}/artifact",
    dependencies=[Depends(may(DEPLOY))],
    response_class=Response,
    responses=says_file(ZIP_TYPE, "The PEFT folder", "ETag", "Content-Disposition"),
)
async def get_artifact(request: Request, task: str, number: int) -> Response:
    """Download a version's PEFT folder as a zip, which is read from the store as the client takes it."""
    download = await state_of(request).uploads.download(tenant_of(request), task, number)
    return ZipStream(download, f"{task}-{number}.zip", request.state.is_head)


def _refuse_base(task: str, what: str) -> None:
    if task == BASE:
        raise InvalidFieldError(f"the base cannot be {what}", "task")


@dataclass(frozen=True)
class Look:
    """Facts of a page's versions beside the registry, taken at once so that another thread may write them out."""

    item_bytes: ItemBytes | None
    used: dict[tuple[str, int], Usage]
    residency: dict[str, str]
    recent: dict[tuple[str, int], list[RequestOutcome]]


async def _look(state: ServerState, tenant: str, tasks: list[Task]) -> Look:
    """Look at what a page of tasks shows, and at the base."""
    shown = [version for task in tasks for version in task.versions]
    keys = [(BASE, 0), *((version.task, version.number) for version in shown)]
    used = await look_up(state, state.stores.registry.usage, tenant, keys)
    where = await _residency(state)
    quarantined = {v.digest: "quarantined" for v in shown if state.revalidation.is_quarantined(v.digest)}
    return Look(
        state.uploads.item_bytes,
        {(usage.task, usage.version): usage for usage in used},
        {version.digest: where.get(version.digest, "disk") for version in shown} | quarantined,
        {(version.task, version.number): state.recent.of((tenant, version.task, version.number)) for version in shown},
    )


async def _residency(state: ServerState) -> dict[str, str]:
    """The engine's residency by digest; empty if it does not answer soon, as within a long step."""
    try:
        async with asyncio.timeout(RESIDENCY_WITHIN_S):
            return await state.client.residency()
    except TimeoutError:
        return {}


def _base(look: Look) -> dict[str, Any]:
    return {"task": BASE, "versions": [], "route": _route(Route()), "use": _use(look, BASE, 0)}


def _task(task: Task, look: Look) -> dict[str, Any]:
    return {
        "task": task.name,
        "versions": [_version(version, look) for version in task.versions],
        "route": _route(task.route),
        "pinned": task.is_pinned,
        "num_versions": task.num_versions,
    }


def _route(route: Route) -> dict[str, Any]:
    return {
        "versions": {str(number): weight for number, weight in sorted(route.weights.items())},
        "sticky": route.sticky,
    }


def _version(version: Version, look: Look) -> dict[str, Any]:
    return {
        **identity(version, look.item_bytes),
        "note": version.note,
        "created": version.created,
        "residency": look.residency[version.digest],
        "use": _use(look, version.task, version.number),
        "recent": summary(look.recent[version.task, version.number]),
    }


def _use(look: Look, task: str, number: int) -> dict[str, int]:
    usage = look.used.get((task, number)) or Usage(task, number, 0, 0, 0)
    counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
    return {"requests": usage.requests, **counts}
