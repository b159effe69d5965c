"""POST /adapters: check an upload, store it and route to it, or refuse it whole."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import JSONResponse, Response

from adapters_store.format.archive import SAFETENSORS_TYPE, ZIP_TYPE
from server.api.body import body_parts
from server.api.deps import admit, may, refuse_unknown_query, state_of, tenant_of
from server.errors import InvalidFieldError, UnsupportedTypeError
from server.requests.auth import DEPLOY
from server.schemas import BASE, NAME_PATTERN, identity
from server.uploads.service import UploadSpec

router = APIRouter(dependencies=[Depends(admit), Depends(may(DEPLOY)), Depends(refuse_unknown_query)])
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

    Once the body is here it is taken in or refused, also if the client has left: threads that write into the staging
    folder cannot be called off.
    """
    state = state_of(request)
    request.state.task = task
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if task == BASE:
        raise InvalidFieldError("the task name base is the base itself", "task")
    if kind not in (ZIP_TYPE, SAFETENSORS_TYPE):
        raise UnsupportedTypeError(f"send {ZIP_TYPE} or {SAFETENSORS_TYPE}, not {kind[:80] or 'no content type'}")
    limit = int(state.settings.max_upload_bytes)
    spec = UploadSpec(tenant_of(request), task, kind, limit, activate, note)
    taken = await state.uploads.accept(spec, body_parts(request, limit, state.settings.body_timeout_s))
    shown = {"task": task, **identity(taken.version, state.uploads.item_bytes), "checks": taken.checks}
    return JSONResponse(shown, 201 if taken.is_new else 200)
