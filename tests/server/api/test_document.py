"""The OpenAPI document: an answer for every status of every route, one form of errors, and the page that shows it.

Every answer that any test of the server gets is held against it, too: see `tests.server.documented`.
"""

from __future__ import annotations

import json
import re
from base64 import b64encode
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import validate

from server.api.docs_page import docs_page
from server.api.document import EVERYWHERE, HAS_BODY, IDENTIFIED
from server.api.middleware import OPENAI_PATHS
from tests.server.documented import JSON, STREAM, document, fault_of, operation_of
from tests.server.world import Site, error_of, open_site

pytestmark = pytest.mark.anyio
ERROR = {"type": "server_error", "code": "internal", "message": "x", "param": None, "request_id": "y"}
NOT_READY = {"/health", "/health/ready", "/ping"}  # say why in an answer of their own
OPEN = {"/docs", "/health/live", *NOT_READY}


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Every route of the document: verb, path, operation."""
    for path, methods in document()["paths"].items():
        for verb, operation in methods.items():
            yield verb, path, operation


async def test_the_document_is_one(shared: Site) -> None:
    """The document is sound by OpenAPI's own schema, stands alone, and bodies are described."""
    answer = await shared.http.get("/openapi.json")
    found = answer.json()
    validate(found)
    for reference in re.findall(r'"\$ref":"#/([^"]+)"', answer.text):
        where = found
        for step in reference.split("/"):
            where = where[step]
    for path in ("/", "/generate", "/v1/completions", "/v1/chat/completions"):
        schema = found["paths"][path]["post"]["requestBody"]["content"][JSON]["schema"]
        for body in schema.get("anyOf", [schema]):
            assert body["additionalProperties"] is False and "stream" in body["properties"]


@pytest.mark.parametrize(("verb", "path", "operation"), [(*one[:2], one[2]) for one in operations()])
def test_every_answer_has_a_schema(verb: str, path: str, operation: dict[str, Any]) -> None:
    """Every route says what it answers, and that its errors have the one form; none has FastAPI's own error."""
    answers = operation["responses"]
    assert {str(status) for status in EVERYWHERE} < set(answers)
    if path not in OPEN:
        assert {str(status) for status in IDENTIFIED} < set(answers)
    if "requestBody" in operation:
        assert {str(status) for status in HAS_BODY} < set(answers)
    for status, answer in answers.items():
        schemas = [content["schema"] for content in answer.get("content", {}).values()]
        assert all(schemas) and bool(schemas) == (status != "204"), (verb, path, status)
        if status >= "400":
            kinds = schemas[0].get("anyOf", schemas)
            assert {"$ref": "#/components/schemas/ErrorAnswer"} in kinds
            is_dialect = operation["tags"] == ["LoRAX and TGI"] or path == "/generate"
            assert len(kinds) == 1 + is_dialect or (status == "503" and path in NOT_READY)
    assert path.startswith(OPENAI_PATHS) == ("422" not in answers), "OpenAI's routes have 400 for it"


def test_every_list_comes_by_pages() -> None:
    """A route whose answer has a list takes a `limit` that has a maximum: no list costs what all that is kept would."""
    whole = {"/tenants/{tenant}/keys"}  # a tenant has at most 1,000
    for verb, path, operation in operations():
        schemas = [
            content["schema"]
            for status, answer in operation["responses"].items()
            if verb == "get" and status == "200"
            for content in answer.get("content", {}).values()
        ]
        if any(has_list(schema) for schema in schemas) and path not in whole:
            limits = [one["schema"] for one in operation.get("parameters", []) if one["name"] == "limit"]
            assert limits and limits[0]["maximum"] <= 1000, path


def has_list(schema: dict[str, Any]) -> bool:
    """Whether an answer of a schema has a list as a part of its own."""
    if "$ref" in schema:
        return has_list(document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]])
    parts = schema.get("properties", {}).values()
    return any(map(has_list, schema.get("anyOf", []))) or any(part.get("type") == "array" for part in parts)


async def test_keys_are_described_if_they_are_asked_for(shared: Site, tiny_base: Path, tmp_path: Path) -> None:
    """A server that asks for keys says so of every route but the open ones; one that asks for none says none."""
    async with open_site(tiny_base, tmp_path / "data", admin_key="k" * 16) as locked:
        paths = locked.app.openapi()["paths"]
        (scheme,) = locked.app.openapi()["components"]["securitySchemes"].values()
    assert (scheme["type"], scheme["scheme"]) == ("http", "bearer")
    for path, methods in paths.items():
        for operation in methods.values():
            assert ("security" in operation) == (path not in OPEN), path
            named = {parameter["name"] for parameter in operation.get("parameters", [])}
            assert ("X-Tenant" in named) == (path not in OPEN), path
    assert '"security":' not in json.dumps(shared.app.openapi()["paths"])


async def test_operations_have_names_of_their_own() -> None:
    """Every operation has an id, which generated clients call it by, and a place among its kin."""
    names = [operation["operationId"] for _, _, operation in operations()]
    assert len(set(names)) == len(names) and all(name.isidentifier() for name in names)
    assert all(len(operation["tags"]) == 1 for _, _, operation in operations())


@pytest.mark.parametrize(
    ("verb", "path", "status", "media_type", "body"),
    [
        ("GET", "/health/live", 200, JSON, {"status": "alive"}),
        ("GET", "/health/live", 200, JSON, {"status": "live", "more": 1}),
        ("GET", "/health/live", 200, JSON, {}),
        ("GET", "/health/live", 200, "text/plain", {"status": "live"}),
        ("GET", "/health/live", 418, JSON, {"error": ERROR}),
        ("GET", "/tasks/a", 404, JSON, {"detail": "FastAPI's own"}),
        ("GET", "/tasks/a", 404, JSON, {"error": {**ERROR, "request_id": None}}),
        ("GET", "/none", 404, JSON, {"detail": "Starlette's own"}),
        ("DELETE", "/tasks/a", 204, JSON, {}),
        ("POST", "/tasks/a/rollback", 200, JSON, {"task": "a"}),
    ],
)
def test_a_fault_is_found(verb: str, path: str, status: int, media_type: str, body: object) -> None:
    """An answer with a field too many or too few, another type, or a status that no route says is told from a true
    one."""
    assert fault_of(operation_of(verb, path), status, media_type, json.dumps(body).encode())


def test_a_fault_in_a_stream_is_found() -> None:
    """Each event is held against its own schema, an error against that of errors; what was cut is not judged."""
    operation = operation_of("POST", "/v1/chat/completions")
    choice = {"index": 0, "delta": {"content": "x"}, "finish_reason": None, "logprobs": None}
    event = {"id": "a", "created": 1, "model": "base", "object": "chat.completion.chunk", "choices": [choice]}
    good = b"data: " + json.dumps(event).encode() + b"\n\n"
    late = b"event: error\ndata: " + json.dumps({"error": ERROR}).encode() + b"\n\n"
    for body in (good * 2 + b"data: [DONE]\n\n", good + late, good + b"data: {"):
        assert fault_of(operation, 200, STREAM, body) is None
    for body in (good + b"data: {}\n\n", good + b"event: error\n" + good, good.replace(b'"x"', b"null")):
        assert fault_of(operation, 200, STREAM, body), body


@pytest.mark.parametrize(("verb", "path"), [one[:2] for one in operations()])
async def test_an_unknown_query_parameter_is_refused_by_name(shared: Site, verb: str, path: str) -> None:
    """No route passes over a query parameter that it does not know, or takes one of two values, in silence."""
    path = path.replace("{number}", "1").replace("{", "").replace("}", "")
    answer = await shared.http.request(verb, f"{path}?surprise=1")
    assert (answer.status_code, error_of(answer)["param"]) == (
        400 if path.startswith(OPENAI_PATHS) else 422,
        "surprise",
    )


async def test_the_page_loads_nothing_of_others(shared: Site) -> None:
    """The page is one file whose policy lets its own script and style run and no other; it names no other host."""
    answer = await shared.http.get("/docs")
    policy, text = answer.headers["content-security-policy"], answer.text
    assert "default-src 'none'" in policy and "unsafe" not in policy and "connect-src 'self'" in policy
    for tag in ("script", "style"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digest = b64encode(sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy and len(content) > 100
    assert not re.search(r"https?:|//[a-z]+\.|<link|src=|style=|\son\w+=|innerHTML|eval\(", text)
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_the_page_is_open_and_the_document_is_not(tiny_base: Path, tmp_path: Path) -> None:
    """With an admin key the page comes without one, since a browser sends none for it, and says nothing of the server;
    the document that it asks for needs the key that is typed into it, in a header."""
    async with open_site(tiny_base, tmp_path / "data", admin_key="k" * 16) as site:
        page = await site.http.get("/docs")
        assert page.status_code == 200 and page.content == docs_page().body
        assert (await site.http.get("/openapi.json")).status_code == 401
        found = await site.http.get("/openapi.json", headers={"Authorization": f"Bearer {'k' * 16}"})
        assert found.status_code == 200
    assert "Authorization" in page.text and "localStorage" not in page.text
