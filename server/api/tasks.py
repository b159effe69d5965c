"""Tasks and their versions: what there is, where it is, and away with it."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request
from starlette.responses import JSONResponse, Response

from adapters_store.blobs import Blobs
from adapters_store.errors import ArtifactError
from adapters_store.intake import ZIP_TYPE, pack_zip
from adapters_store.registry import Task, Usage, Version
from adapters_store.spec import ItemBytes
from server.api.callers import DEPLOY
from server.api.front import admit, front_of, may, refuse_unknown_query, tenant_of
from server.api.show import identity
from server.api.wire import BASE
from server.errors import ArtifactRefusedError, InvalidFieldError

router = APIRouter(dependencies=[Depends(admit), Depends(may(DEPLOY, looking=True)), Depends(refuse_unknown_query)])


@router.get("/tasks")
async def list_tasks(request: Request) -> Response:
    """All tasks of the tenant, and the base."""
    front, tenant = front_of(request), tenant_of(request)
    found = await asyncio.to_thread(front.registry.tasks, tenant)
    used = await asyncio.to_thread(front.registry.usage, tenant)
    where = await front.client.residency()
    return JSONResponse({"tasks": [_base(used), *(_task(task, where, used, front.item_bytes()) for task in found)]})


@router.get("/tasks/{task}")
async def get_task(request: Request, task: str) -> Response:
    """One task: versions, route, residency, use."""
    front, tenant = front_of(request), tenant_of(request)
    used = await asyncio.to_thread(front.registry.usage, tenant)
    if task == BASE:
        return JSONResponse(_base(used))
    found = await front.absent_is_404(front.registry.task, tenant, task)
    return JSONResponse(_task(found, await front.client.residency(), used, front.item_bytes()))


@router.delete("/tasks/{task}", status_code=204)
async def delete_task(request: Request, task: str) -> Response:
    """Gone for new requests at once; running ones finish with what they began with."""
    front, tenant = front_of(request), tenant_of(request)
    _refuse_base(task)
    await front.give_up(await front.absent_is_404(front.registry.delete_task, tenant, task))
    return Response(status_code=204)


@router.delete("/tasks/{task}/versions/{number}", status_code=204)
async def delete_version(request: Request, task: str, number: int) -> Response:
    """Gone for new requests at once, also from the route."""
    front, tenant = front_of(request), tenant_of(request)
    _refuse_base(task)
    await front.give_up([await front.absent_is_404(front.registry.delete_version, tenant, task, number)])
    return Response(status_code=204)


@router.get("/tasks/{task}/versions/{number}/artifact", dependencies=[Depends(may(DEPLOY))])
async def get_artifact(request: Request, task: str, number: int) -> Response:
    """The PEFT folder back, as a zip."""
    front, tenant = front_of(request), tenant_of(request)
    version = await front.resolve(tenant, task, number)
    try:
        with front.in_use.hold([version.digest]):
            await front.check_kept(tenant, [version])
            body = await front.absent_is_404(_zip, front.blobs, version.digest)
    except ArtifactError as error:
        raise ArtifactRefusedError(error) from error
    finally:
        await front.bury([version.digest])
    headers = {"Content-Disposition": f'attachment; filename="{task}-{number}.zip"', "ETag": f'"{version.digest}"'}
    return Response(body, media_type=ZIP_TYPE, headers=headers)


def _zip(blobs: Blobs, digest: str) -> bytes:
    blobs.read(digest)  # verifies it
    with blobs.staging() as folder:
        pack_zip(blobs.path(digest), folder / "artifact.zip")
        return (folder / "artifact.zip").read_bytes()


def _refuse_base(task: str) -> None:
    if task == BASE:
        raise InvalidFieldError("the base cannot be deleted", "task")


def _base(used: list[Usage]) -> dict[str, Any]:
    return {"task": BASE, "versions": [], "route": {"versions": {}}, "use": _use(used, BASE, 0)}


def _task(task: Task, where: dict[str, str], used: list[Usage], item_bytes: ItemBytes | None) -> dict[str, Any]:
    return {
        "task": task.name,
        "versions": [_version(version, where, used, item_bytes) for version in task.versions],
        "route": {"versions": {str(number): weight for number, weight in task.route.items()}},
    }


def _version(
    version: Version, where: dict[str, str], used: list[Usage], item_bytes: ItemBytes | None
) -> dict[str, Any]:
    return {
        **identity(version, item_bytes),
        "note": version.note,
        "created": version.created,
        "residency": where.get(version.digest, "disk"),
        "use": _use(used, version.task, version.number),
    }


def _use(used: list[Usage], task: str, number: int) -> dict[str, int]:
    for usage in used:
        if (usage.task, usage.version) == (task, number):
            counts = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens}
            return {"requests": usage.requests, **counts}
    return {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
