"""Bodies that are refused before anything runs: each with the error form, its status, and the name of the fault."""

from __future__ import annotations

import json
from typing import Any

import pytest

from server.requests import prepare
from tests.server.world import MAX_TOKENS, Site, error_of

pytestmark = pytest.mark.anyio
LONE = '"\\ud83d"'  # half of an emoji
DEEP = "[" * 70 + "]" * 70

# (body as JSON text, status, param, words of the message)
NOT_JSON = [
    ("", "there is no body"),
    ("{", "sound JSON"),
    ('{"prompt": "a"} x', "sound JSON"),
    ("[]", "not a JSON object"),
    ('"prompt"', "not a JSON object"),
    ('{"prompt": "a", "temperature": NaN}', "NaN"),
    ('{"prompt": "a", "temperature": -Infinity}', "Infinity"),
    ('{"prompt": "a", "temperature": 1e999}', "does not fit"),
    ('{"prompt": "a", "prompt": "b"}', "'prompt' appears twice"),
    ('{"prompt": "a", "logit_bias": {"1": 1, "1": 2}}', "'1' appears twice"),
    (f'{{"prompt": {LONE}}}', "surrogate"),
    (f'{{"prompt": "a", {LONE}: 1}}', "surrogate"),
    ('{"prompt": "a\\u0000b"}', "NUL"),
    (f'{{"prompt": "a", "max_tokens": {"9" * 5000}}}', "more than 20 digits"),
    (f'{{"prompt": {DEEP}}}', "nested deeper"),
    (f'{{"prompt": {"[" * 200_000}}}', "nested deeper"),
]
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"promt": "a"}, "promt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": True}, "prompt"),
    ({"prompt": ["a", 5]}, "prompt.1"),
    ({"prompt": []}, "prompt"),
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt_token_ids": []}, "prompt_token_ids"),
    ({"prompt_token_ids": [1, True]}, "prompt_token_ids.1"),
    ({"prompt_token_ids": [-1]}, "prompt_token_ids.0"),
    ({"prompt_token_ids": [1.0]}, "prompt_token_ids.0"),
    ({"prompt_token_ids": [259]}, "prompt_token_ids"),
    ({"prompt_token_ids": [10**19]}, "prompt_token_ids"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "critic", "content": "a"}]}, "messages.0.role"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages.0.name"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": "1"}, "max_tokens"),
    ({"max_tokens": 1.0}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": None}, "max_tokens"),
    ({"temperature": "0"}, "temperature"),
    ({"temperature": False}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": 101}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.01}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 10**19}, "top_k"),
    ({"min_p": -0.1}, "min_p"),
    ({"min_p": 1.1}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty"),
    ({"repetition_penalty": 11}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -2.1}, "frequency_penalty"),
    ({"logit_bias": {"a": 1}}, "logit_bias.a"),
    ({"logit_bias": {"-1": 1}}, "logit_bias.-1"),
    ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    ({"logit_bias": {"259": 1}}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(1025)}}, "logit_bias"),
    ({"logit_bias": []}, "logit_bias"),
    ({"seed": 2**63}, "seed"),
    ({"seed": -(2**63) - 1}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"stop": "a"}, "stop"),
    ({"stop": [""]}, "stop.0"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": ["a" * 65]}, "stop.0"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [259]}, "stop_token_ids"),
    ({"stop_token_ids": [1] * 257}, "stop_token_ids"),
    ({"logprobs": 6}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stream": "true"}, "stream"),
    ({"timeout_s": 0}, "timeout_s"),
    ({"timeout_s": 3601}, "timeout_s"),
    ({"version": 0}, "version"),
    ({"version": "1"}, "version"),
    ({"version": 1}, "version"),  # the base has none
    ({"response_format": {"type": "structural_tag"}}, "response_format"),
    ({"response_format": {}}, "response_format"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format.json_schema.schema"),
    ({"response_format": {"type": "json_schema", "schema": {}, "strict": True}}, "response_format.strict"),
    ({"response_format": {"type": "regex"}}, "response_format.regex"),
    ({"response_format": {"type": "choice", "choices": []}}, "response_format.choices"),
    ({"response_format": {"type": "choice", "choices": ["a", ""]}}, "response_format.choices.1"),
    ({"response_format": {"type": "grammar", "grammar": 1}}, "response_format.grammar"),
]


@pytest.mark.parametrize(("body", "says"), NOT_JSON)
async def test_not_json(shared: Site, body: str, says: str) -> None:
    """A body that is no sound JSON object is 400, and the message says what is wrong with it."""
    answer = await shared.post("/generate?task=base", body)
    error = error_of(answer)
    assert (answer.status_code, error["type"]) == (400, "invalid_request_error")
    assert says in error["message"]


async def test_not_utf8(shared: Site) -> None:
    """A body that is not UTF-8 is 400 with the place of the byte."""
    answer = await shared.post("/generate?task=base", b'{"prompt": "\xff"}')
    assert answer.status_code == 400 and "byte 12" in error_of(answer)["message"]


@pytest.mark.parametrize(("body", "param"), FIELDS)
async def test_wrong_fields(shared: Site, body: dict[str, Any], param: str) -> None:
    """An unknown field, a wrong type or a value out of range is 422 and named; nothing reaches the engine."""
    before = len(shared.engine.submitted)
    has_prompt = any(name in body for name in ("prompt", "promt", "messages", "prompt_token_ids"))
    answer = await shared.post("/generate?task=base", body if has_prompt else {"prompt": "a", **body})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["param"]) == (422, "invalid_field", param), error
    assert param.split(".")[0] in error["message"]
    assert len(shared.engine.submitted) == before


@pytest.mark.parametrize(
    ("logprobs", "param"), [({}, "n"), ({"logprobs": 0}, "logprobs"), ({"logprobs": 5}, "logprobs")]
)
@pytest.mark.parametrize("path", ["/generate?task=base", "/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_has_a_bound(
    shared: Site, monkeypatch: pytest.MonkeyPatch, path: str, logprobs: dict[str, int], param: str, stream: bool
) -> None:
    """What an answer could have at most is computed before anything runs, on every route: what is at the bound is
    answered, what is over it is 400 with the sizes that make it so; the bound is far over what is asked for."""
    body: dict[str, Any] = {"n": 2, "max_tokens": 4, "stream": stream}
    if "chat" in path:
        tops = {"logprobs": True, "top_logprobs": logprobs["logprobs"]} if logprobs else {}
        body |= {"model": "base", "messages": [{"role": "user", "content": "a"}], **tops}
    else:
        body |= {"model": "base", "prompt": "a", **logprobs} if "v1" in path else {"prompt": "a", **logprobs}
    size = 8 * (16 + sum(128 * (1 + top) for top in logprobs.values()))
    assert 10_000 * size < prepare.MAX_ANSWER_BYTES
    monkeypatch.setattr(prepare, "MAX_ANSWER_BYTES", size)
    assert (await shared.post(path, body)).status_code == 200
    before = len(shared.engine.submitted)
    answer = await shared.post(path, {**body, "max_tokens": 5})
    error = error_of(answer)
    assert (answer.status_code, error["param"], len(shared.engine.submitted)) == (400, param, before)
    assert "n=2" in error["message"] and "max_tokens=5" in error["message"]


@pytest.mark.parametrize("num_logprobs", [0, 1, 21])
async def test_what_is_left_out_is_never_too_much(
    shared: Site, monkeypatch: pytest.MonkeyPatch, num_logprobs: int
) -> None:
    """Without `max_tokens` an answer may have what its bound allows, however long the context is; it is not refused."""
    fields = {"logprobs": True, "top_logprobs": num_logprobs - 1} if num_logprobs else {}
    body = {"model": "base", "messages": [{"role": "user", "content": "a"}], "n": 2, **fields}
    monkeypatch.setattr(prepare, "MAX_ANSWER_BYTES", 2 * 7 * (16 + 128 * num_logprobs) + 1)
    assert (await shared.post("/v1/chat/completions", body)).status_code == 200
    assert {submit.sampling.max_tokens for submit in shared.engine.submitted[-2:]} == {7}


async def test_a_field_is_never_quoted_at_length(shared: Site) -> None:
    """The name of an unknown field is cut."""
    error = error_of(await shared.post("/generate?task=base", {"prompt": "a", "x" * 5000: 1}))
    assert len(error["param"]) <= 200 and len(error["message"]) < 300


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
        {"prompt": "a", "prompt_token_ids": [1]},
        {"prompt": "a", "messages": [{"role": "user", "content": "a"}], "prompt_token_ids": [1]},
    ],
)
async def test_two_prompts_at_once(shared: Site, fields: dict[str, Any]) -> None:
    """More than one of prompt, messages and prompt_token_ids is 400 and says which were given."""
    answer = await shared.post("/generate?task=base", fields)
    assert answer.status_code == 400
    assert all(name in error_of(answer)["message"] for name in fields)


async def test_no_prompt(shared: Site) -> None:
    """A body with none of the three prompts, or with one that has no tokens, is 400."""
    assert (await shared.post("/generate?task=base", {})).status_code == 400
    answer = await shared.post("/generate?task=base", {"prompt": ["a", ""]})
    assert answer.status_code == 400 and "no tokens" in error_of(answer)["message"]


async def test_prompt_too_long(shared: Site) -> None:
    """A prompt that does not fit is 400 with its length and the limit, in a list too; nothing reaches the engine."""
    before = len(shared.engine.submitted)
    for prompt in ("a" * 390, ["b", "a" * 390]):
        answer = await shared.post("/generate?task=base", {"prompt": prompt, "max_tokens": 11})
        error = error_of(answer)
        assert (answer.status_code, error["param"]) == (400, "prompt")
        assert "390 tokens" in error["message"] and str(MAX_TOKENS) in error["message"]
    assert len(shared.engine.submitted) == before


@pytest.mark.parametrize(
    "name",
    ["unknown", "One", "one ", "a%00b", "..%2f..%2fetc", "%ff%fe", "x" * 64, "x" * 5000, "'; drop--", "🎩", "BASE"],
)
async def test_unknown_task_is_404(shared: Site, name: str) -> None:
    """A name that is no task is 404, with any content; never the base, never 500."""
    before = len(shared.engine.submitted)
    answer = await shared.post(f"/generate?task={name}", {"prompt": "a"})
    error = error_of(answer)
    assert (answer.status_code, error["code"], error["type"]) == (404, "not_found", "not_found_error")
    assert len(error["message"]) < 200
    assert len(shared.engine.submitted) == before


async def test_missing_task_is_400(shared: Site) -> None:
    """A request without a task, or with an empty one, is 400; the base must be asked for by name."""
    for path in ("/generate", "/generate?task="):
        answer = await shared.post(path, {"prompt": "a"})
        assert (answer.status_code, error_of(answer)["param"]) == (400, "task")


async def test_unknown_version_is_404(shared: Site) -> None:
    """A version that the task does not have is 404."""
    for version in (2, 2**63 - 1, 10**19):
        answer = await shared.post("/generate?task=one", {"prompt": "a", "version": version})
        assert answer.status_code == 404 and str(version) in error_of(answer)["message"]


async def test_unknown_query_is_422(shared: Site) -> None:
    """A query parameter that a route does not know is 422 and named: it would be ignored in silence."""
    answer = await shared.post("/generate?task=one&version=1", {"prompt": "a"})
    assert (answer.status_code, error_of(answer)["param"]) == (422, "version")
    answer = await shared.http.post("/adapters?task=one&activte=false", content=b"")
    assert (answer.status_code, error_of(answer)["param"]) == (422, "activte")
    answer = await shared.http.delete("/tasks/one?version=1")
    assert (answer.status_code, error_of(answer)["param"]) == (422, "version")
    assert (await shared.http.get("/tasks/one")).status_code == 200, "the whole task would have gone"


async def test_a_query_given_twice_is_422(shared: Site) -> None:
    """A query parameter that is there twice is 422 and named: one of the two would be ignored in silence."""
    answer = await shared.post("/generate?task=one&task=two", {"prompt": "a"})
    assert (answer.status_code, error_of(answer)["param"]) == (422, "task")


@pytest.mark.parametrize(
    ("body", "path", "status", "param"),
    [
        ({"adapters": [{"task": "one"}]}, "/generate?task=one", 400, "adapters"),
        ({"adapters": [{"task": "one"}], "version": 1}, "/generate", 400, "adapters"),
        ({"adapters": []}, "/generate", 422, "adapters"),
        ({"adapters": [{"task": "one"}] * 9}, "/generate", 422, "adapters"),
        ({"adapters": [{"task": "One"}]}, "/generate", 422, "adapters.0.task"),
        ({"adapters": [{"task": "one", "weight": 101}]}, "/generate", 422, "adapters.0.weight"),
        ({"adapters": [{"task": "one", "weight": "1"}]}, "/generate", 422, "adapters.0.weight"),
        ({"adapters": [{"task": "one", "wieght": 1}]}, "/generate", 422, "adapters.0.wieght"),
        ({"adapters": [{"weight": 1}]}, "/generate", 422, "adapters.0.task"),
        ({"adapters": [{"task": "base"}]}, "/generate", 422, "adapters"),
        ({"adapters": [{"task": "one"}, {"task": "none"}]}, "/generate", 404, "task"),
    ],
)
async def test_wrong_adapters(shared: Site, body: dict[str, Any], path: str, status: int, param: str) -> None:
    """A list of adapters that cannot be meant is refused and named; one unknown task in it is 404 for the whole."""
    answer = await shared.post(path, {"prompt": "a", **body})
    assert (answer.status_code, error_of(answer)["param"]) == (status, param)


async def test_a_template_that_refuses(shared: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that the base's chat template refuses are 400 with the template's own reason."""
    template = "{{ raise_exception('turns must alternate') }}"
    monkeypatch.setattr(shared.state.tokenizer._tokenizer, "chat_template", template)
    answer = await shared.post("/generate?task=base", {"messages": [{"role": "user", "content": "a"}]})
    assert (answer.status_code, error_of(answer)["param"]) == (400, "messages")
    assert "turns must alternate" in error_of(answer)["message"]


async def test_a_base_without_template(shared: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages to a base that has no chat template are 400 and say what to do."""
    monkeypatch.setattr(shared.state.tokenizer._tokenizer, "chat_template", None)
    answer = await shared.post("/generate?task=base", {"messages": [{"role": "user", "content": "a"}]})
    assert answer.status_code == 400 and "send a prompt" in error_of(answer)["message"]


async def test_body_over_its_cap_is_413(shared: Site) -> None:
    """A JSON body over its cap is 413, on every route that takes one."""
    body = json.dumps({"prompt": "a" * (4 * 2**20)})
    for path in ("/generate?task=base", "/v1/completions", "/v1/chat/completions"):
        answer = await shared.post(path, body)
        assert (answer.status_code, error_of(answer)["code"]) == (413, "too_large")
