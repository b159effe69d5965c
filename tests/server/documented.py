"""Hold answers against the OpenAPI document: a middleware that sees every answer which any test of the server gets."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema_rs import Draft202012Validator, ValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.app import create_app
from server.engine.fake import FakeEngineClient
from server.settings import Settings

JSON, STREAM = "application/json", "text/event-stream"
UNTOLD = re.compile(  # HTTP's own, and what only browsers and proxies read
    "content-(type|length|security-policy)|date|server|connection|vary|allow|cache-control|referrer-policy|"
    "(access-control|cross-origin|x-accel|x-content-type)-.*"
)
ERROR = {"$ref": "#/components/schemas/ErrorAnswer"}
Operation = dict[str, Any]


@cache
def document() -> dict[str, Any]:
    """The document, with every object closed: a field that is not in it is a fault."""
    made = create_app(Settings(), Path(), FakeEngineClient()).openapi()
    for schema in _objects(made["components"]["schemas"]):
        schema.setdefault("additionalProperties", False)
    return made


def _objects(node: Any) -> Iterator[dict[str, Any]]:
    """Every schema below a node that lists properties."""
    if isinstance(node, dict) and isinstance(node.get("properties"), dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _objects(child)


@cache
def _patterns() -> list[tuple[re.Pattern[str], dict[str, Operation]]]:
    """Paths as patterns with their operations, those without parameters first."""
    paths = sorted(document()["paths"].items(), key=lambda item: item[0].count("{"))
    return [(re.compile(re.sub(r"\{\w+\}", "[^/]+", path)), methods) for path, methods in paths]


def operation_of(method: str, path: str) -> Operation | None:
    """The operation of a request; None if it is for no route of the document."""
    path = path[:-1] if path.endswith("/") and path != "/" else path
    verb = "get" if method == "HEAD" else method.lower()
    return next((ways[verb] for pattern, ways in _patterns() if verb in ways and pattern.fullmatch(path)), None)


@cache
def _validator(schema: str) -> Draft202012Validator:
    return Draft202012Validator({**json.loads(schema), "components": document()["components"]})


def check(schema: dict[str, Any], body: bytes) -> str | None:
    """What is wrong with a JSON body; None if nothing is."""
    try:
        _validator(json.dumps(schema)).validate(json.loads(body))
    except (ValidationError, ValueError) as error:
        return f"{str(error)[:200]} in {body[:200]!r}"
    return None


def fault_of(operation: Operation | None, status: int, media_type: str, body: bytes) -> str | None:
    """What the document does not say of an answer; None if it is as documented. A body may end early."""
    if operation is None:
        return check(ERROR, body) if status >= 400 and body else None
    if str(status) not in operation["responses"]:
        return "the status is not documented"
    content = operation["responses"][str(status)].get("content", {})
    if media_type not in content and (media_type or content):
        return f"{media_type or 'no type'} is not documented"
    if media_type == STREAM:
        schema = content[STREAM]["schema"]
        dialects = schema["anyOf"] if "anyOf" in schema["anyOf"][0] else [schema]
        faults = [_stream_fault(one, body) for one in dialects]
        return faults[0] if all(faults) else None
    return check(content[JSON]["schema"], body) if media_type == JSON and body else None


def untold_header(operation: Operation | None, status: int, names: set[bytes]) -> str | None:
    """What the document does not say of an answer's headers, by their names in lower case; None if it says all."""
    if operation is None or str(status) not in operation["responses"]:
        return None
    told = {name.lower() for name in operation["responses"][str(status)]["headers"]}
    untold = sorted(
        name.decode() for name in names if name.decode() not in told and not UNTOLD.fullmatch(name.decode())
    )
    return f"the header {untold[0]} is not documented" if untold else None


def _stream_fault(schema: dict[str, Any], body: bytes) -> str | None:
    """What a dialect does not say of a stream: its messages are an event, the error that may end it, and its last."""
    messages = schema["anyOf"]
    event, *failure = [message["properties"]["data"].get("contentSchema") for message in messages[:2]]
    blocks = [block.rpartition(b"data: ") for block in body.split(b"\n\n")[:-1]]
    if len(messages) > 2:
        blocks = [block for block in blocks if block[2] != b"[DONE]"]
    faults = [check(failure[0] if failure and kind == b"event: error\n" else event, data) for kind, _, data in blocks]
    return next(filter(None, faults), None)


class DocumentedAnswers:
    """Appends to `faults` for each answer that is not as the document says."""

    def __init__(self, app: ASGIApp, faults: list[str]) -> None:
        self._app, self._faults = app, faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request inside, and look at what is answered."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS":
            await self._app(scope, receive, send)
            return
        start: Message | None = None
        body = bytearray()
        is_whole = False

        async def look(message: Message) -> None:
            nonlocal start, is_whole
            if message["type"] == "http.response.start":
                start = message
            elif scope["method"] != "HEAD":
                body.extend(message.get("body", b""))
            is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, look)
        if start is not None and is_whole and start["status"] != 499:  # nobody is there to read that
            self._judge(scope, start, bytes(body))

    def _judge(self, scope: Scope, start: Message, body: bytes) -> None:
        status = start["status"]
        headers = {name.lower(): value for name, value in start["headers"]}
        media_type = headers.get(b"content-type", b"").decode().partition(";")[0]
        operation = operation_of(scope["method"], scope["path"])
        found = [fault_of(operation, status, media_type, body), untold_header(operation, status, set(headers))]
        self._faults += [f"{scope['method']} {scope['path'][:80]} {status}: {fault}" for fault in found if fault]
