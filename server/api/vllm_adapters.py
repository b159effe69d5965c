"""Load and unload adapters as vLLM's clients do: through our door, into versions, from allowed places alone."""

from __future__ import annotations

import re
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import PlainTextResponse, Response

from adapters_store.errors import AbsentError, NotAllowedError
from adapters_store.storage.load_roots import copy_adapter
from server.api import openai_fields
from server.api.body import read_json
from server.api.deps import caller_of, counted_callers, look_up, state_of, tenant_of
from server.api.document import COUNTED, HAS_BODY, errors, says_file
from server.api.openai_fields import Tolerant
from server.api.tasks import end_task
from server.errors import BadRequestError, ForbiddenError, NotFoundError
from server.requests.auth import DEPLOY
from server.schemas import BASE, NAME_PATTERN, openapi_body
from server.state import ServerState
from server.uploads.service import UploadSpec

router = APIRouter(
    prefix="/v1",
    tags=["vLLM"],
    dependencies=counted_callers(DEPLOY),
    responses=errors(*COUNTED, *HAS_BODY, 409) | says_file("text/plain", "Done, in a sentence"),
    default_response_class=Response,
)
Name = Annotated[str, Field(min_length=1, max_length=200)]


class LoadAdapterRequest(Tolerant):
    """The body of POST /v1/load_lora_adapter."""

    neutral = openai_fields.LOAD
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False


class UnloadAdapterRequest(Tolerant):
    """The body of POST /v1/unload_lora_adapter."""

    neutral = openai_fields.UNLOAD
    lora_name: Name


@router.post("/load_lora_adapter", openapi_extra=openapi_body(LoadAdapterRequest))
async def load_lora_adapter(request: Request) -> Response:
    """Take the adapter at a path or URL in as a task, or as a task's next version with `load_inplace`."""
    state, caller = state_of(request), caller_of(request)
    _require_roots(state)
    asked = await read_json(request, LoadAdapterRequest, state)
    name = request.state.task = asked.lora_name
    if not re.fullmatch(NAME_PATTERN, name) or name == BASE:
        raise BadRequestError(f"lora_name: {name} is no name of a task: {NAME_PATTERN}, and not {BASE}", "lora_name")
    if not asked.load_inplace and await _is_task(state, caller.tenant, name):
        raise BadRequestError(
            f"The lora adapter '{name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True.",
            "lora_name",
        )
    max_bytes = int(state.settings.max_upload_bytes)
    spec = UploadSpec(
        caller.tenant, name, max_bytes, note=f"loaded from {asked.lora_path}"[:1000], limits=caller.limits
    )
    copy = partial(copy_adapter, state.load_roots, asked.lora_path, max_bytes=max_bytes)
    try:
        await state.uploads.load(spec, copy)
    except NotAllowedError as error:
        raise ForbiddenError(str(error), "lora_path") from None
    except AbsentError as error:
        raise NotFoundError(str(error), "lora_path") from None
    return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")


@router.post("/unload_lora_adapter", openapi_extra=openapi_body(UnloadAdapterRequest))
async def unload_lora_adapter(request: Request) -> Response:
    """Delete a task with all its versions: new requests get 404 at once, running ones finish."""
    state, tenant = state_of(request), tenant_of(request)
    _require_roots(state)
    asked = await read_json(request, UnloadAdapterRequest, state)
    name = request.state.task = asked.lora_name
    try:
        await end_task(state, tenant, name)
    except NotFoundError:
        raise NotFoundError(f"The lora adapter '{name}' cannot be found.", "lora_name") from None
    return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")


def _require_roots(state: ServerState) -> None:
    """Raise `ForbiddenError` unless the operator names places to load from."""
    if not state.load_roots:
        raise ForbiddenError(
            "this server loads no adapters from elsewhere: upload them by POST /adapters, or start it with "
            "--allow-load-from"
        )


async def _is_task(state: ServerState, tenant: str, name: str) -> bool:
    try:
        await look_up(state, state.stores.registry.task, tenant, name, None, 1)
    except NotFoundError:
        return False
    return True
