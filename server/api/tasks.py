"""Tasks and their versions: what there is, where it is, and away with it."""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from adapters_store.intake import ZIP_TYPE, pack_zip
from adapters_store.registry import Task, Usage, Version
from server.api.front import front_of, tenant_of
from server.api.wire import BASE
from server.errors import InvalidFieldError, NotFoundError

router = APIRouter()


@router.get("/tasks")
async def list_tasks(request: Request) -> Response:
    """All tasks of the tenant, and the base."""
    front, tenant = front_of(request), tenant_of(request)
    found = await asyncio.to_thread(front.registry.tasks, tenant)
    used = await asyncio.to_thread(front.registry.usage, tenant)
    where = await front.client.residency()
    tasks = [{"task": BASE, "versions": [], "route": {}, "use": _use(used, BASE, 0)}]
    return JSONResponse({"tasks": tasks + [_task(task, where, used) for task in found]})


@router.get("/tasks/{task}")
async def get_task(request: Request, task: str) -> Response:
    """One task: versions, route, residency, use."""
    front, tenant = front_of(request), tenant_of(request)
    found = await front.absent_is_404(front.registry.task, tenant, task)
    used = await asyncio.to_thread(front.registry.usage, tenant)
    return JSONResponse(_task(found, await front.client.residency(), used))


@router.delete("/tasks/{task}", status_code=204)
async def delete_task(request: Request, task: str) -> Response:
    """Gone for new requests at once; running ones finish with what they began with."""
    front, tenant = front_of(request), tenant_of(request)
    _refuse_base(task)
    digests = await front.absent_is_404(front.registry.delete_task, tenant, task)
    front.given_up.update(digests)
    await front.bury(digests)
    return Response(status_code=204)


@router.delete("/tasks/{task}/versions/{number}", status_code=204)
async def delete_version(request: Request, task: str, number: int) -> Response:
    """Gone for new requests at once, also from the route."""
    front, tenant = front_of(request), tenant_of(request)
    _refuse_base(task)
    digest = await front.absent_is_404(front.registry.delete_version, tenant, task, number)
    front.given_up.add(digest)
    await front.bury([digest])
    return Response(status_code=204)


@router.get("/tasks/{task}/versions/{number}/artifact")
async def get_artifact(request: Request, task: str, number: int) -> Response:
    """The PEFT folder back, as a zip."""
    front, tenant = front_of(request), tenant_of(request)
    version = await front.resolve(tenant, task, number)
    with front.in_use.hold([version.digest]):
        body = await asyncio.to_thread(_zip, front.blobs.path(version.digest))
    headers = {"Content-Disposition": f'attachment; filename="{task}-{number}.zip"', "ETag": f'"{version.digest}"'}
    return Response(body, media_type=ZIP_TYPE, headers=headers)


def _zip(folder: Path) -> bytes:
    if not folder.is_dir():
        raise NotFoundError("the artifact is gone", "version")
    with tempfile.TemporaryDirectory() as temporary:
        pack_zip(folder, Path(temporary) / "artifact.zip")
        return (Path(temporary) / "artifact.zip").read_bytes()


def _refuse_base(task: str) -> None:
    if task == BASE:
        raise InvalidFieldError("the base cannot be deleted", "task")


def _task(task: Task, where: dict[str, str], used: list[Usage]) -> dict[str, Any]:
    return {
        "task": task.name,
        "versions": [_version(version, where, used) for version in task.versions],
        "route": {"versions": {str(number): weight for number, weight in task.route.items()}},
    }


def _version(version: Version, where: dict[str, str], used: list[Usage]) -> dict[str, Any]:
    return {
        "version": version.number,
        "digest": version.digest,
        "method": version.method,
        "num_parameters": version.num_parameters,
        "bytes": version.num_bytes,
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
