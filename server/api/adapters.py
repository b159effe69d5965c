"""POST /adapters: an upload is checked, stored and routed to, or refused whole."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from adapters_store.errors import ArtifactError
from adapters_store.format.archive import SAFETENSORS_TYPE, ZIP_TYPE, unpack_upload
from server.api.body import body_parts
from server.api.deps import admit, may, refuse_unknown_query, state_of, tenant_of
from server.errors import ArtifactRefusedError, InvalidFieldError, ServerError, UnavailableError, UnsupportedTypeError
from server.requests.auth import DEPLOY
from server.schemas import BASE, NAME_PATTERN, identity
from server.state import ServerState
from server.uploads.register import FOLDER, register_artifact
from server.uploads.validation import ValidatedArtifact, validate

router = APIRouter(dependencies=[Depends(admit), Depends(may(DEPLOY)), Depends(refuse_unknown_query)])
INTAKE_WITHIN_S = 60.0
TaskQuery = Annotated[str, Query(pattern=NAME_PATTERN)]
NoteQuery = Annotated[str, Query(max_length=1000, pattern=r"^[^\x00]*$")]
BODY = {
    "requestBody": {
        "required": True,
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in (ZIP_TYPE, SAFETENSORS_TYPE)},
    }
}


@router.post("/adapters", status_code=201, openapi_extra=BODY)
async def upload(request: Request, task: TaskQuery, activate: bool = True, note: NoteQuery = "") -> Response:
    """Take an adapter in: a zip of a PEFT folder, or one safetensors file with its config in its metadata.

    Once the body is here it is taken in or refused, also where the client has left: threads that write into the staging
    folder cannot be called off.
    """
    state, tenant = state_of(request), tenant_of(request)
    request.state.task = task
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if task == BASE:
        raise InvalidFieldError("the task name base is the base itself", "task")
    if kind not in (ZIP_TYPE, SAFETENSORS_TYPE):
        raise UnsupportedTypeError(f"send {ZIP_TYPE} or {SAFETENSORS_TYPE}, not {kind[:80] or 'no content type'}")
    state.ready()  # or 503, before a long body comes
    try:
        with state.blobs.staging() as staging:
            await _receive(request, state, staging / "body")
            async with _intake_slot(state):
                validated = await _validate_body(state, staging, kind)
                version, is_new = await register_artifact(
                    state, tenant, task, staging / FOLDER, validated, activate, note
                )
    except ArtifactError as error:
        state.metrics.uploads.labels("refused").inc()
        raise ArtifactRefusedError(error) from None
    except ServerError as error:
        state.metrics.uploads.labels("refused" if error.status < 500 else "failed").inc()
        raise
    except OSError:
        state.metrics.uploads.labels("failed").inc()
        raise
    state.metrics.uploads.labels("taken").inc()
    shown = {"task": version.task, **identity(version, state.item_bytes()), "checks": validated.checks}
    return JSONResponse(shown, 201 if is_new else 200)


@asynccontextmanager
async def _intake_slot(state: ServerState) -> AsyncIterator[None]:
    """One of the few uploads that are checked at once. Raises `UnavailableError` where too many wait for it."""
    try:
        async with asyncio.timeout(INTAKE_WITHIN_S):
            await state.intake.acquire()
    except TimeoutError:
        raise UnavailableError("too many uploads wait to be checked; nothing was stored", retry_after=5) from None
    try:
        yield
    finally:
        state.intake.release()


async def _receive(request: Request, state: ServerState, path: Path) -> None:
    """Stream the body to a file, capped."""
    settings = state.settings
    with path.open("wb") as file:
        async for part in body_parts(request, settings.max_upload_bytes, settings.body_timeout_s):
            await asyncio.to_thread(file.write, part)


async def _validate_body(state: ServerState, staging: Path, kind: str) -> ValidatedArtifact:
    folder = staging / FOLDER
    folder.mkdir()
    await asyncio.to_thread(unpack_upload, staging / "body", kind, folder, int(state.settings.max_upload_bytes))
    return await validate(state, folder)
