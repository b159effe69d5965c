"""Read request bodies: capped, in time, and as JSON that says one thing only."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from adapters_store.format.strict_json import StrictJSONError, loads
from server.errors import BadRequestError, InvalidFieldError, TooLargeError, UnsupportedTypeError
from server.schemas import Strict
from server.state import ServerState

Model = TypeVar("Model", bound=Strict)
T = TypeVar("T")
MIN_BYTES_PER_S = 16 * 2**10  # of a whole body: a part now and then does not keep it open
PART_BYTES = 64 * 2**10  # of what is unpacked at once
GZIP = zlib.MAX_WBITS | 16  # zlib's word for it
THREAD_BYTES = 32 * 2**10  # longer JSON is parsed off the event loop


async def body_parts(request: Request, max_bytes: int, timeout_s: float) -> AsyncIterator[bytes]:
    """The parts of a body as they come, unpacked if it is gzip; none is larger than `PART_BYTES` then.

    Raises `TooLargeError`, `UnsupportedTypeError` for another encoding, or `BadRequestError` if the body stops coming,
    crawls, or is no gzip. One whose declared length is over the cap is refused before it comes. `timeout_s` bounds the
    time between parts.
    """
    _coding(request, "Transfer-Encoding", "chunked")
    encoding = _coding(request, "Content-Encoding", "identity", "gzip", "x-gzip")
    parts = _parts(request, max_bytes, timeout_s)
    if encoding == "identity":
        async for part in parts:
            yield part
        return
    size, unpacking = 0, zlib.decompressobj(wbits=GZIP)
    async for part in parts:
        for unpacked in _unpacked(unpacking, part):
            size += len(unpacked)
            if size > max_bytes:
                raise _too_large(max_bytes)
            yield unpacked
    if not unpacking.eof:
        raise BadRequestError("the body is not whole: its gzip ends too early", "Content-Encoding")


def _coding(request: Request, header: str, *taken: str) -> str:
    """The body's coding by a header, else the first that is taken. Raises `UnsupportedTypeError` for any other."""
    coding = ", ".join(filter(None, request.headers.getlist(header))).strip().lower() or taken[0]
    if coding not in taken:
        raise UnsupportedTypeError(
            f"the body's encoding {coding[:40]} is not taken: send it as it is, or as gzip by Content-Encoding", header
        )
    return coding


def _unpacked(unpacking: Any, packed: bytes) -> Iterator[bytes]:
    """Unpack bytes of gzip in pieces. Raises `BadRequestError` if they are none, or go on after its end."""
    try:
        piece = unpacking.decompress(packed, PART_BYTES)
        while piece:
            yield piece
            piece = unpacking.decompress(unpacking.unconsumed_tail, PART_BYTES)
    except zlib.error as error:
        raise BadRequestError(
            f"the body is no gzip, as its Content-Encoding says: {error}", "Content-Encoding"
        ) from None
    if unpacking.unused_data:
        raise BadRequestError("the body has bytes after the end of its gzip", "Content-Encoding")


async def _parts(request: Request, max_bytes: int, timeout_s: float) -> AsyncIterator[bytes]:
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    began, size, parts = time.monotonic(), 0, aiter(request.stream())
    while True:
        left = began + timeout_s + size / MIN_BYTES_PER_S - time.monotonic()
        try:
            async with asyncio.timeout(min(left, timeout_s)):
                part = await anext(parts)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise BadRequestError(
                f"the body stopped coming: a part must come within {timeout_s:g} s, "
                f"and all of it at {MIN_BYTES_PER_S} bytes a second or faster"
            ) from None
        size += len(part)
        if size > max_bytes:
            raise _too_large(max_bytes)
        yield part


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"the body is larger than {max_bytes} bytes")


async def read_json(request: Request, model: type[Model], state: ServerState) -> Model:
    """The whole body as a model, within the settings' bounds. Raises the errors of `read_object` and `validated`."""
    return await (await read_object(request, state)).read_as(model)


async def read_object(request: Request, state: ServerState) -> BodyObject:
    """The whole body, within the settings' bounds. Raises the errors of `body_parts` and `parse`."""
    body, settings = bytearray(), state.settings
    async for part in body_parts(request, settings.max_body_bytes, settings.body_timeout_s):
        body += part
    run = state.tenant_work.run if len(body) > THREAD_BYTES else _at_once
    return BodyObject(await run(parse, bytes(body)), run)


async def _at_once(work: Callable[..., T], *args: Any) -> T:
    return work(*args)


@dataclass(frozen=True)
class BodyObject:
    """A body's JSON object, and the way to run what reads it: off the event loop if it is long."""

    data: dict[str, Any]
    _run: Callable[..., Awaitable[Any]]

    async def read_as(self, model: type[Model]) -> Model:
        """The object as a model. Raises `InvalidFieldError` for a field."""
        read: Model = await self._run(validated, model, self.data)
        return read


def parse(body: bytes) -> dict[str, Any]:
    """The object that a body is. Raises `BadRequestError` if it is no JSON object."""
    if not body:
        raise BadRequestError("there is no body: send a JSON object")
    try:
        data = loads(body)
    except StrictJSONError as error:
        raise BadRequestError(f"the body is not sound JSON: {error}") from None
    if not isinstance(data, dict):
        raise BadRequestError("the body is not a JSON object")
    return data


def validated(model: type[Model], data: dict[str, Any]) -> Model:
    """The object as a model. Raises `InvalidFieldError` for a field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _refusal(model, data, error) from None


def _refusal(model: type[Strict], data: Any, error: ValidationError) -> InvalidFieldError:
    """Name the wrong field: in a union, by the error of the branch that got furthest.

    A branch of the right type that a limit refuses got further than one of a wrong type, however deep that is. A field
    too many tells more than one that is missing: it is what stands in the other's place.
    """
    found = error.errors(include_url=False, include_input=False)
    worst = max(found, key=_rank)
    field = ".".join(_path(data, worst["loc"], worst["type"] == "missing"))[:200] or "body"
    if worst["type"] == "extra_forbidden":
        return InvalidFieldError(model.unknown(field), field)
    return InvalidFieldError(f"{field}: {worst['msg']}", field)


def _rank(error: ErrorDetails) -> tuple[bool, int, int]:
    kind = error["type"]
    return not kind.endswith("_type"), len(error["loc"]), {"missing": 0, "extra_forbidden": 1}.get(kind, 2)


def _path(data: Any, loc: tuple[int | str, ...], is_missing: bool) -> Iterator[str]:
    """The parts of a location that are in the data: without pydantic's names of a union's branches."""
    for at, part in enumerate(loc):
        if part in data if isinstance(data, dict) else isinstance(data, list) and isinstance(part, int):
            data = data[part]
        elif not (is_missing and at == len(loc) - 1):
            continue
        yield str(part)
