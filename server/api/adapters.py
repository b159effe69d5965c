"""POST /adapters: check an upload, store it and route to it, or refuse it whole."""

from __future__ import annotations

from email.message import Message
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import JSONResponse, Response

from adapters_store.format.archive import CONTENT_TYPES, SAFETENSORS_TYPE, ZIP_TYPE
from server.api.answers import UploadAnswer
from server.api.body import body_parts
from server.api.deps import caller_of, counted_callers, state_of
from server.api.document import COUNTED, HAS_BODY, errors, says
from server.api.form_file import FORM_TYPE, file_parts
from server.errors import InvalidFieldError, UnsupportedTypeError
from server.requests.auth import DEPLOY
from server.schemas import BASE, NAME_PATTERN, identity
from server.uploads.service import UploadSpec

router = APIRouter(
    tags=["Adapters and tasks"],
    dependencies=counted_callers(DEPLOY),
    responses=errors(*COUNTED, *HAS_BODY, 409, 422),
)
TaskQuery = Annotated[str, Query(pattern=NAME_PATTERN)]
TimeoutQuery = Annotated[float | None, Query(gt=0, le=3600)]
NoteQuery = Annotated[str, Query(max_length=1000, pattern=r"^[^\x00]*$")]
BINARY = {"type": "string", "format": "binary"}
FORM = {"type": "object", "properties": {"file": BINARY}, "required": ["file"]}
BODY = {
    "requestBody": {
        "required": True,
        "content": {**{kind: {"schema": BINARY} for kind in CONTENT_TYPES}, FORM_TYPE: {"schema": FORM}},
    }
}


@router.post(
    "/adapters",
    status_code=201,
    openapi_extra=BODY,
    responses=says(UploadAnswer, status=201, description="A new version")
    | says(UploadAnswer, description="The version that has these bytes already"),
)
async def upload(
    request: Request, task: TaskQuery, activate: bool = True, note: NoteQuery = "", timeout_s: TimeoutQuery = None
) -> Response:
    """Take an adapter in: a zip or tar.gz of its folder, or one safetensors file with its config in its metadata.

    Of a folder that a trainer left only the adapter's files are opened. The body is the file itself, or a form with it
    alone; its own bytes tell what it is. Its probes wait `timeout_s` seconds (30) for a busy engine. Once it is here it
    is taken in or refused, also if the client has left: threads that write into the staging folder cannot be called
    off.
    """
    state = state_of(request)
    request.state.task = task
    if task == BASE:
        raise InvalidFieldError("the task name base is the base itself", "task")
    limit = int(state.settings.max_upload_bytes)
    boundary = _boundary(request.headers.get("content-type", ""))
    parts = body_parts(request, limit, state.settings.body_timeout_s)
    body = parts if boundary is None else file_parts(parts, boundary)
    caller = caller_of(request)
    spec = UploadSpec(caller.tenant, task, limit, activate, note, caller.limits, timeout_s)
    taken = await state.uploads.accept(spec, body)
    shown = {"task": task, **identity(taken.version, state.uploads.item_bytes), "checks": taken.checks}
    return JSONResponse(shown, 201 if taken.is_new else 200)


def _boundary(content_type: str) -> str | None:
    """Return the boundary of a form's parts, or None for a body that is the file. Raises `UnsupportedTypeError`."""
    kind = content_type.partition(";")[0].strip().lower()
    message = Message()
    message["content-type"] = content_type
    if kind == FORM_TYPE and (boundary := message.get_boundary()):
        return boundary
    if kind not in CONTENT_TYPES:
        raise UnsupportedTypeError(
            f"send {ZIP_TYPE}, application/gzip, {SAFETENSORS_TYPE}, application/octet-stream, or {FORM_TYPE} with a "
            f"boundary, not {kind[:80] or 'no content type'}"
        )
    return None
