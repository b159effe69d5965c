"""`response_format` on every route: the form reaches the engine, and what cannot be served is 400 and named."""

from __future__ import annotations

from typing import Any

import pytest

from server.core import EngineFailure, FormSpec
from server.engine.grammar import grammar_of
from server.engine.messages import Output, Submit
from tests.server.world import Site, error_of

pytestmark = pytest.mark.anyio
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
AS_OPENAI = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
ROUTES: list[tuple[str, dict[str, Any]]] = [
    ("/generate?task=base", {"prompt": "a"}),
    ("/v1/completions", {"model": "base", "prompt": "a"}),
    ("/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "a"}]}),
]
FORMS: list[tuple[dict[str, Any], tuple[Any, Any]]] = [
    ({"response_format": AS_OPENAI}, ("json_schema", SCHEMA)),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, ("json_schema", SCHEMA)),
    ({"response_format": {"type": "json_object"}}, ("json_schema", {"type": "object"})),
    ({"response_format": {"type": "regex", "regex": "a+"}}, ("regex", "a+")),
    ({"response_format": {"type": "choice", "choices": ["a", "b"]}}, ("choice", ["a", "b"])),
    ({"response_format": {"type": "grammar", "grammar": 'start: "a"'}}, ("grammar", 'start: "a"')),
]
FORMS_OF_VLLM: list[tuple[dict[str, Any], tuple[Any, Any]]] = [
    ({"structured_outputs": {"json": SCHEMA}}, ("json_schema", SCHEMA)),
    ({"structured_outputs": {"json": '{"type": "object"}', "regex": None}}, ("json_schema", {"type": "object"})),
    ({"structured_outputs": {"json_object": True}}, ("json_schema", {"type": "object"})),
    ({"structured_outputs": {"regex": "a+", "disable_any_whitespace": True}}, ("regex", "a+")),
    ({"structured_outputs": {"choice": ["a"]}}, ("choice", ["a"])),
    ({"structured_outputs": {"grammar": 'root ::= "a"'}}, ("grammar", 'root ::= "a"')),
    ({"guided_json": SCHEMA}, ("json_schema", SCHEMA)),
    ({"guided_json": '{"type": "object"}'}, ("json_schema", {"type": "object"})),
    ({"guided_regex": "a+"}, ("regex", "a+")),
    ({"guided_choice": ["a"]}, ("choice", ["a"])),
    ({"guided_grammar": 'start: "a"', "response_format": {"type": "text"}}, ("grammar", 'start: "a"')),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_every_form_reaches_the_engine(shared: Site, path: str, body: dict[str, Any]) -> None:
    """Each form, in each dialect that the route has, is the grammar of every choice; none and `text` are none."""
    for fields, (kind, value) in FORMS + (FORMS_OF_VLLM if "/v1" in path else []):
        answer = await shared.post(path, {**body, **fields, "n": 2})
        assert answer.status_code == 200, (fields, answer.text)
        wanted = grammar_of(FormSpec(kind, value, "f"))
        assert [submit.form for submit in shared.engine.submitted[-2:]] == [wanted] * 2, fields
    for free in ({}, {"response_format": None}, {"response_format": {"type": "text"}}):
        assert (await shared.post(path, {**body, **free})).status_code == 200
        assert shared.engine.submitted[-1].form is None


OF_TGI: list[tuple[dict[str, Any], tuple[Any, Any]]] = [
    ({"grammar": {"type": "json", "value": SCHEMA}}, ("json_schema", SCHEMA)),
    ({"grammar": {"type": "json", "value": '{"type": "object"}'}}, ("json_schema", {"type": "object"})),
    ({"grammar": {"type": "json_schema", "value": {"name": "x", "schema": SCHEMA}}}, ("json_schema", SCHEMA)),
    ({"grammar": {"type": "regex", "value": "a+"}}, ("regex", "a+")),
    ({"response_format": {"type": "json_object"}}, ("json_schema", {"type": "object"})),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, ("json_schema", SCHEMA)),
]
OF_RESPONSES: list[tuple[dict[str, Any], tuple[Any, Any]]] = [
    ({"type": "json_object"}, ("json_schema", {"type": "object"})),
    ({"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}, ("json_schema", SCHEMA)),
]


async def test_forms_of_the_other_dialects(shared: Site) -> None:
    """A form of TGI's, of LoRAX's and of OpenAI's responses is the grammar, too, and the response tells it again."""
    asked = [("/generate", {"inputs": "a", "parameters": fields}, form) for fields, form in OF_TGI]
    asked += [
        ("/v1/responses", {"model": "base", "input": "a", "text": {"format": one}}, form) for one, form in OF_RESPONSES
    ]
    for path, body, (kind, value) in asked:
        answer = await shared.post(path, body)
        assert answer.status_code == 200, (body, answer.text)
        assert shared.engine.submitted[-1].form == grammar_of(FormSpec(kind, value, "f")), body
        assert path == "/generate" or answer.json()["text"] == body["text"]
    schema = {"properties": {"a": {"uniqueItems": True}}}
    for path, body, param in (
        (
            "/generate",
            {"inputs": "a", "parameters": {"grammar": {"type": "json", "value": schema}}},
            "parameters.grammar.value",
        ),
        (
            "/v1/responses",
            {"model": "base", "input": "a", "text": {"format": {**OF_RESPONSES[1][0], "schema": schema}}},
            "text.format.schema",
        ),
    ):
        error = error_of(answer := await shared.post(path, body))
        assert (answer.status_code, error["param"]) == (400, f"{param}#/properties/a/uniqueItems")
    both = {"grammar": {"type": "regex", "value": "a"}, "response_format": {"type": "json_object"}}
    assert (await shared.post("/generate", {"inputs": "a", "parameters": both})).status_code == 422


@pytest.mark.parametrize(("path", "body"), ROUTES)
async def test_what_is_not_served_is_named(shared: Site, path: str, body: dict[str, Any]) -> None:
    """An unsupported keyword is 400 `unsupported_schema` by its JSON pointer; so is `ignore_eos`, by its own name."""
    before = len(shared.engine.submitted)
    schema = {"properties": {"a": {"uniqueItems": True}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = error_of(answer := await shared.post(path, {**body, "response_format": form}))
    assert (answer.status_code, error["code"]) == (400, "unsupported_schema")
    assert error["param"] == "response_format.json_schema.schema#/properties/a/uniqueItems"
    answer = await shared.post(path, {**body, "response_format": {"type": "json_object"}, "ignore_eos": True})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "ignore_eos")
    answer = await shared.post(path, {**body, "response_format": {"type": "structural_tag"}})
    assert answer.status_code in (400, 422) and "structural_tag" in error_of(answer)["message"]
    assert len(shared.engine.submitted) == before


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {}}, "structured_outputs"),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
    ],
)
async def test_one_sound_form(shared: Site, fields: dict[str, Any], param: str) -> None:
    """Two forms in a request, or one that is malformed, are 400 by the field's name."""
    for path, body in ROUTES[1:]:
        answer = await shared.post(path, {**body, **fields})
        assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text


async def test_a_form_that_fails_in_the_engine_is_400(shared: Site) -> None:
    """A form that only the engine finds too complex is 400, as one that the door refuses."""
    shared.engine.failure = EngineFailure("unsupported_schema", "too complex")
    try:
        for path, body in ROUTES:
            answer = await shared.post(path, {**body, "response_format": {"type": "json_object"}})
            assert (answer.status_code, error_of(answer)["code"]) == (400, "unsupported_schema")
    finally:
        shared.engine.failure = None


async def test_several_tokens_of_one_step(shared: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that a form forced, which come together, are told as if each came alone: its end, stop texts and usage."""
    bodies: list[dict[str, Any]] = [
        {},
        {"stop": ["de"]},
        {"stop": ["xe", "h"]},
        {"stop_token_ids": [101]},
        {"max_tokens": 3},
        {"n": 2},
    ]
    outputs = shared.engine._outputs

    async def told() -> list[Any]:
        answers = [await shared.ask(prompt="abcdefgh", **body) for body in bodies]
        events = [await shared.events(prompt="abcdefgh", **body) for body in bodies]
        texts = ["".join(event["text"] for event in one if event["index"] == 0) for one in events]
        ids = [[token for event in one for token in event["token_ids"] if event["index"] == 0] for one in events]
        assert texts == [answer["choices"][0]["text"] for answer in answers]
        return [[(answer["choices"], answer["usage"]) for answer in answers], ids]

    def together(submit: Submit) -> list[Output]:
        single = outputs(submit)
        single[0].token_ids = [token for output in single for token in output.token_ids]
        single[0].finish_reason = single[-1].finish_reason
        return single[:1]

    one_by_one = await told()
    monkeypatch.setattr(shared.engine, "_outputs", together)
    assert await told() == one_by_one
