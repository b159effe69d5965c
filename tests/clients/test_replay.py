"""What clients of others send is answered in the form that they read, or refused by a field that is not served yet."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub import TextGenerationOutput, TextGenerationStreamOutput
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.clients.record import CLIENTS, KEY, record, script_of
from tests.clients.world import RECORDS, SETTINGS, TASK, add_task, engine_of, record_of
from tests.server.world import Site, error_of, open_site, sent

pytestmark = pytest.mark.anyio
MAX_BYTES = 20_000  # of a record
FORMS: dict[str, tuple[type[BaseModel], type[BaseModel]]] = {  # of an answer, and of an event of a stream
    "/v1/completions": (Completion, Completion),
    "/v1/chat/completions": (ChatCompletion, ChatCompletionChunk),
}
RESPONSE_EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
NOT_SERVED_YET = {  # fields and routes that come later: record these clients again when they are there
    "lm-eval": {"/tokenizer_info"},
}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Async tests run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="module")
async def server(anyio_backend: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A server with the task that all clients were recorded with."""
    folder = tmp_path_factory.mktemp("clients")
    async with open_site(tiny_base, folder / "data", engine_of(tiny_base), **SETTINGS) as site:
        await add_task(site, tiny_base, folder / "lora")
        yield site


def test_every_client_has_a_record() -> None:
    """Each client has a record that says its version and date, is small, and holds no key."""
    assert {path.stem for path in RECORDS.glob("*.json")} == CLIENTS.keys()
    for name, client in CLIENTS.items():
        found = record_of(name)
        assert (found["package"], found["script"]) == (client.package, script_of(name).name)
        assert found["version"] and found["recorded"] > "2026" and found["requests"]
        text = (RECORDS / f"{name}.json").read_text()
        assert len(text) < MAX_BYTES and KEY not in text and "authorization" not in text.lower()


@pytest.mark.parametrize("client", CLIENTS)
async def test_replay(server: Site, client: str) -> None:
    """Every request of a record is taken, and answered in the form of its SDK; one for what comes later is refused."""
    for request in record_of(client)["requests"]:
        answer = await _send(server, request)
        if "refused" in request:
            _check_refusal(request, answer)
        else:
            assert answer.status_code == request["status"] == 200, (request, answer.text)
            _check_form(request, answer)


@pytest.mark.parametrize("client", CLIENTS)
def test_what_is_refused_is_listed(client: str) -> None:
    """A client's records are refused for the listed fields, and for no others."""
    refused = {request["refused"] for request in record_of(client)["requests"] if "refused" in request}
    assert refused == NOT_SERVED_YET.get(client, set())


async def test_a_client_runs(tiny_base: Path, tmp_path: Path) -> None:
    """OpenAI's client, as it is installed with the tests, takes every answer, and asks as it was recorded to."""
    requests = await record([sys.executable, "-P", str(script_of("openai-python"))], tiny_base, tmp_path)
    recorded = record_of("openai-python")["requests"]
    kept = ("method", "path", "status", "refused")
    assert [[one.get(key) for key in kept] for one in requests] == [[one.get(key) for key in kept] for one in recorded]


async def test_a_client_that_fails_is_not_recorded(tiny_base: Path, tmp_path: Path) -> None:
    """A script that takes an answer as wrong gives no record, but what it said."""
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('that is no answer')")
    with pytest.raises(RuntimeError, match="that is no answer"):
        await record([sys.executable, "-P", str(script)], tiny_base, tmp_path)


async def _send(server: Site, request: dict[str, Any]) -> httpx2.Response:
    content = json.dumps(request["body"]) if "body" in request else None
    return await server.http.request(request["method"], request["path"], headers=request["headers"], content=content)


def _check_refusal(request: dict[str, Any], answer: httpx2.Response) -> None:
    """Assert that a refusal names the field, in its `param` and in words, or the route that there is not."""
    error, refused = error_of(answer), request["refused"]
    assert (answer.status_code, error["param"] or request["path"]) == (request["status"], refused)
    assert refused in error["message"], error


def _check_form(request: dict[str, Any], answer: httpx2.Response) -> None:
    """Assert that an answer is what OpenAI's own models say, strictly, and that a stream ends as it must."""
    path, body = request["path"], request.get("body", {})
    if path == "/v1/models":
        assert [Model.model_validate(one, strict=True).id for one in answer.json()["data"]] == ["base", TASK]
    elif path.startswith("/v1/models/"):
        assert Model.model_validate(answer.json(), strict=True).id == TASK
    elif path == "/health":
        assert answer.json()["status"] == "ready"
    elif path == "/":
        _check_text_generation(answer.text, is_stream=body.get("stream", False))
    elif path == "/v1/responses":
        _check_response(answer.text, is_stream=body.get("stream", False))
    elif body.get("stream"):
        *events, done = sent(answer.text)
        assert events and done == ("message", "[DONE]")
        for _, data in events:
            FORMS[path][1].model_validate(_without_null_reason(json.loads(data)), strict=True)
    else:
        FORMS[path][0].model_validate(_without_first_null(answer.json()), strict=True)
        assert answer.json()["choices"]


def _check_response(answer: str, *, is_stream: bool) -> None:
    """Assert that an answer is OpenAI's response, or its events, the last of which has the whole."""
    if is_stream:
        events = [RESPONSE_EVENT.validate_json(data, strict=True) for _, data in sent(answer)]
        assert events[-1].type == "response.completed"
    else:
        assert Response.model_validate_json(answer, strict=True).status == "completed"


def _check_text_generation(answer: str, *, is_stream: bool) -> None:
    """Assert that an answer is what Hugging Face's models of TGI read, and that a stream ends with the text."""
    if is_stream:
        *_, last = [TextGenerationStreamOutput.parse_obj_as_instance(json.loads(data)) for _, data in sent(answer)]
        assert last.generated_text and last.details
    else:
        (whole,) = TextGenerationOutput.parse_obj_as_list(json.loads(answer))
        assert whole.generated_text


def _without_first_null(answer: dict[str, Any]) -> dict[str, Any]:
    """Give the first token of an echo a score: OpenAI's own answers have null there, unlike its model of them."""
    for choice in answer["choices"]:
        logprobs = choice.get("logprobs") or {}
        for name, score in (("token_logprobs", 0.0), ("top_logprobs", {})):
            if logprobs.get(name, [0])[:1] == [None]:
                logprobs[name][0] = score
    return answer


def _without_null_reason(event: dict[str, Any]) -> dict[str, Any]:
    """Give an event's choices an end: OpenAI's own streams of completions have null there, unlike its model of them."""
    choices = [choice | {"finish_reason": choice["finish_reason"] or "stop"} for choice in event["choices"]]
    return event | {"choices": choices}
