"""POST /adapters: an upload is checked, stored and routed to, or refused whole."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from adapters_store.artifact import Artifact, read_folder
from adapters_store.errors import ArtifactError, ArtifactTooLargeError
from adapters_store.intake import SAFETENSORS_TYPE, ZIP_TYPE, unpack_upload
from adapters_store.methods import Room, compile_patch
from adapters_store.patch import Patch
from adapters_store.registry import Version
from server.api.body import body_parts
from server.api.front import Front, admit, front_of, refuse_unknown_query, tenant_of
from server.api.show import identity
from server.api.wire import BASE, NAME
from server.engine.messages import Ready
from server.errors import (
    ArtifactRefusedError,
    InvalidFieldError,
    UnsupportedTypeError,
)

router = APIRouter(dependencies=[Depends(admit), Depends(refuse_unknown_query)])
MIN_ROOM = 2  # positions that a prefix must leave: one for a prompt, one for an answer
FOLDER = "folder"  # of staging: where a body is unpacked

TaskQuery = Annotated[str, Query(pattern=NAME)]
NoteQuery = Annotated[str, Query(max_length=1000, pattern=r"^[^\x00]*$")]
BODY = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (ZIP_TYPE, SAFETENSORS_TYPE)},
    }
}


@dataclass(frozen=True)
class Proved:
    """An artifact that passed every check, compiled for the base."""

    artifact: Artifact
    patch: Patch
    checks: list[dict[str, Any]]


@router.post("/adapters", status_code=201, openapi_extra=BODY)
async def upload(request: Request, task: TaskQuery, activate: bool = True, note: NoteQuery = "") -> Response:
    """Take an adapter in: a zip of a PEFT folder, or one safetensors file with its config in its metadata.

    Once the body is here it is taken in or refused, also where the client has left: threads that write into the staging
    folder cannot be called off.
    """
    front, tenant = front_of(request), tenant_of(request)
    request.state.task = task
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if task == BASE:
        raise InvalidFieldError("the task name base is the base itself", "task")
    if kind not in (ZIP_TYPE, SAFETENSORS_TYPE):
        raise UnsupportedTypeError(f"send {ZIP_TYPE} or {SAFETENSORS_TYPE}, not {kind[:80] or 'no content type'}")
    front.ready()  # or 503, before a long body comes
    try:
        with front.blobs.staging() as staging:
            await _receive(request, front, staging / "body")
            async with front.intake:
                proved = await _prove_body(front, staging, kind)
                version, is_new = await keep(front, tenant, task, staging / FOLDER, proved, activate, note)
    except ArtifactError as error:
        front.metrics.uploads.labels("refused").inc()
        raise ArtifactRefusedError(error) from None
    except OSError:
        front.metrics.uploads.labels("failed").inc()
        raise
    front.metrics.uploads.labels("taken").inc()
    shown = {"task": version.task, **identity(version, front.item_bytes()), "checks": proved.checks}
    return JSONResponse(shown, 201 if is_new else 200)


async def _receive(request: Request, front: Front, path: Path) -> None:
    """Stream the body to a file, capped."""
    settings = front.settings
    with path.open("wb") as file:
        async for part in body_parts(request, settings.max_upload_bytes, settings.body_timeout_s):
            await asyncio.to_thread(file.write, part)


async def _prove_body(front: Front, staging: Path, kind: str) -> Proved:
    folder = staging / FOLDER
    folder.mkdir()
    await asyncio.to_thread(unpack_upload, staging / "body", kind, folder, int(front.settings.max_upload_bytes))
    return await asyncio.to_thread(prove, front, folder)


def prove(front: Front, folder: Path) -> Proved:
    """Check a PEFT folder for form, finiteness, method, base, shapes and size. Raises `ArtifactError`."""
    ready = front.ready()
    artifact = read_folder(folder)
    patch = compile_patch(artifact, ready.spec, Room(ready.max_adapter_bytes, ready.item_bytes))
    _check_virtual(patch, ready)
    is_named = artifact.manifest is not None
    checks = {
        "form": f"{len(artifact.tensors)} tensors, {artifact.num_bytes} bytes",
        "finite": f"{patch.num_parameters} parameters",
        "method": patch.method,
        "base": f"identity {ready.spec.identity[:12]} matches" if is_named else "no manifest: shapes alone tell",
        "shapes": f"{len(patch.primitives)} primitives for {ready.spec.name}",
    }
    return Proved(artifact, patch, [{"name": name, "ok": True, "detail": said} for name, said in checks.items()])


def _check_virtual(patch: Patch, ready: Ready) -> None:
    """Refuse what leaves no room for a request. Raises `ArtifactTooLargeError`."""
    if patch.num_virtual + MIN_ROOM > ready.max_sequence_tokens:
        raise ArtifactTooLargeError(
            f"the adapter has {patch.num_virtual} virtual tokens, which leave no room for a prompt and an answer in "
            f"this server's {ready.max_sequence_tokens} tokens a sequence"
        )


async def keep(
    front: Front, tenant: str, task: str, folder: Path, proved: Proved, activate: bool, note: str
) -> tuple[Version, bool]:
    """Store and register; durable on return. Where that fails, nothing is kept."""
    artifact, patch = proved.artifact, proved.patch
    values: dict[str, Any] = {
        "digest": artifact.digest,
        "method": patch.method,
        "num_parameters": patch.num_parameters,
        "num_items": patch.num_items,
        "num_matrix_items": patch.num_matrix_items,
        "num_virtual": patch.num_virtual,
        "num_bytes": artifact.num_bytes,
        "prompt_format": artifact.manifest.prompt_format if artifact.manifest else None,
    }
    try:
        async with front.store_lock:
            await asyncio.to_thread(front.blobs.put, folder, artifact.digest)
            return await asyncio.to_thread(
                lambda: front.registry.add_version(tenant, task, note=note, activate=activate, **values)
            )
    except Exception:
        await front.give_up([artifact.digest])
        raise
