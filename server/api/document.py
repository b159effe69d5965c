"""Describe the API: what each kind of route answers, and the OpenAPI document as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from types import GenericAlias
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import TypeAdapter
from typing_extensions import is_typeddict

from server.api import (
    answers,
    openai_answers,
    responses_answers,
    tenant_answers,
    text_generation_answers,
    vllm_answers,
)
from server.api.answers import ErrorAnswer

Responses = dict[int | str, dict[str, Any]]
Kind = type | GenericAlias  # of an answer, or a list of one
STREAM = "text/event-stream"

MEANINGS = {
    400: "Malformed, or over a limit of this server",
    401: "No key, or a bad one",
    403: "The key may not do this; or, without keys, Host or Origin is not this machine",
    404: "Absent, or another tenant's",
    409: "In conflict with what is there",
    413: "The body is too large",
    414: "The URL is too long",
    415: "A content type or encoding that is not taken",
    422: "A field, a query parameter or an adapter that is not valid",
    429: "A limit of the tenant; Retry-After where waiting helps",
    431: "The headers are too large",
    500: "A bug of the server",
    503: "Overloaded, starting or stopping, or a store does not answer: ask again",
    504: "The deadline passed",
    507: "The disk is full or fails",
}
HEADERS = {
    "X-Request-Id": ("string", "The request's own, or one that the server drew"),
    "Retry-After": ("integer", "Seconds until asking again may help"),
    "WWW-Authenticate": ("string", "How to send a key"),
    "Content-Disposition": ("string", "A name for the file"),
    "ETag": ("string", "The artifact's digest"),
}
SENT_WITH = {"401": ["WWW-Authenticate"], "429": ["Retry-After"], "503": ["Retry-After"]}  # besides X-Request-Id
EVERYWHERE = (400, 414, 431, 500, 503)  # also before a request is complete: see `server.http_protocol`
IDENTIFIED = (401, 403, 404, 507)
COUNTED = (*IDENTIFIED, 429)
HAS_BODY = (400, 413, 415)
GENERATES = (*HAS_BODY, 504)
ANSWERS = (answers, tenant_answers, openai_answers, responses_answers, vllm_answers, text_generation_answers)
VALIDATION_ERROR = "#/components/schemas/HTTPValidationError"  # FastAPI's own, which no route answers
DESCRIPTION = """Every error has the form of `ErrorAnswer`, or of `TextGenerationError` where clients of LoRAX and TGI
ask, and every answer the header X-Request-Id: the request's own if it sent one. HEAD is taken where GET is. A stream is
server-sent events: each has the JSON of the schema, the last is `[DONE]` where the schema has it; an error after the
first byte is an event `error`, or `response.failed` of OpenAI's responses, and the end."""


def errors(*statuses: int, also: type | None = None) -> Responses:
    """Describe the errors that a route answers, all in the one form, or also in that of its dialect."""
    content = _json(ErrorAnswer) if also is None else _json(ErrorAnswer, also)
    return {status: {"description": MEANINGS[status], "content": content} for status in statuses}


def says(*kinds: Kind, status: int = 200, description: str = "Done") -> Responses:
    """Describe an answer: JSON of one of these types, or nothing if there is none."""
    return {status: {"description": description, **({"content": _json(*kinds)} if kinds else {})}}


def says_whole_or_streamed(whole: Kind, event: type) -> Responses:
    """Describe an answer that comes whole, or as server-sent events if the body says `stream`."""
    end = {"type": "object", "required": ["data"], "properties": {"data": {"const": "[DONE]"}}}
    content = _json(whole) | _stream([*_messages((event,), ErrorAnswer), end])
    return {200: {"description": "The answer, whole or as it comes", "content": content}}


def says_streamed(events: tuple[type, ...], failure: type | None, whole: Kind | None = None) -> Responses:
    """Describe server-sent events of a dialect that ends them without a word, and the whole answer if there is one.

    Without a `failure` one of the events tells that the answer failed.
    """
    content = ({} if whole is None else _json(whole)) | _stream(_messages(events, failure))
    return {200: {"description": "The answer, as it comes" + (", or whole" if whole else ""), "content": content}}


def says_either(first: Responses, second: Responses) -> Responses:
    """Describe the answers of a route that has two dialects, both whole or streamed."""
    (one,), (other,) = first.values(), second.values()
    content = {
        kind: {"schema": {"anyOf": [one["content"][kind]["schema"], other["content"][kind]["schema"]]}}
        for kind in one["content"]
    }
    return {200: {**one, "content": content}}


def _messages(events: tuple[type, ...], failure: type | None) -> list[dict[str, Any]]:
    """Schemas of the events of a stream: those that tell the answer, and the error that may end it."""
    data = {"type": "string", "contentMediaType": "application/json"}
    message = {"type": "object", "required": ["data"], "properties": {"data": {**data, "contentSchema": _ref(*events)}}}
    if failure is None:
        return [message]
    failed = {
        "type": "object",
        "required": ["event", "data"],
        "properties": {"event": {"const": "error"}, "data": {**data, "contentSchema": _ref(failure)}},
    }
    return [message, failed]


def _stream(messages: list[dict[str, Any]]) -> dict[str, Any]:
    return {STREAM: {"schema": {"anyOf": messages}}}  # of each event, as tools read it before OpenAPI 3.2


def says_file(media_type: str, description: str, *headers: str) -> Responses:
    """Describe an answer that is no JSON, with those of `HEADERS` that only it has."""
    schema = {"type": "string"} if media_type.startswith("text/") else {"type": "string", "format": "binary"}
    named = {"headers": _headers(headers)} if headers else {}
    return {200: {"description": description, "content": {media_type: {"schema": schema}}, **named}}


GONE = says(status=204, description="Deleted")


def describe_api(app: FastAPI, asks_for_keys: bool) -> dict[str, Any]:
    """Make the OpenAPI document, once; a server that asks for no keys says so."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            summary=app.summary,
            description=DESCRIPTION,
            version=version("manyhats"),
            routes=app.routes,
        )
        for operation in [one for methods in document["paths"].values() for one in methods.values()]:
            found = operation["responses"]
            if VALIDATION_ERROR in str(found.get("422")):
                del found["422"]
            operation["responses"] = dict(sorted(found.items()))
            for status, answer in found.items():
                names = ["X-Request-Id", *SENT_WITH.get(status, []), *answer.get("headers", ())]
                answer["headers"] = _headers(names)
            if not asks_for_keys:
                operation.pop("security", None)
        document["components"]["schemas"] = _schemas()
        document["components"]["headers"] = {
            name: {"description": description, "schema": {"type": kind}}
            for name, (kind, description) in HEADERS.items()
        }
        app.openapi_schema = document
    return app.openapi_schema


def _schemas() -> dict[str, Any]:
    """JSON schemas of all answers by name."""
    kinds = [one for room in ANSWERS for one in vars(room).values() if is_typeddict(one)]
    wanted = [(kind, "serialization", TypeAdapter(kind)) for kind in dict.fromkeys(kinds) if kind.__name__[0] != "_"]
    _, definitions = TypeAdapter.json_schemas(wanted, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    found: dict[str, Any] = definitions["$defs"]
    return found


def _headers(names: Iterable[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _json(*kinds: Kind) -> dict[str, Any]:
    return {"application/json": {"schema": _ref(*kinds)}}


def _ref(*kinds: Kind) -> dict[str, Any]:
    """A schema that names the types; one of several is any of them."""
    refs = [_ref_of_one(one) for one in kinds]
    return refs[0] if len(refs) == 1 else {"anyOf": refs}


def _ref_of_one(kind: Kind) -> dict[str, Any]:
    if isinstance(kind, GenericAlias):
        return {"type": "array", "items": _ref(*kind.__args__)}
    return {"type": "object"} if kind is dict else {"$ref": f"#/components/schemas/{kind.__name__}"}
