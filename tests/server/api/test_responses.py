"""OpenAI's responses: the official client works unchanged, whole and streamed; what needs a state is refused."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseOutputMessage, ResponseOutputText
from pydantic import TypeAdapter

from server.core import EngineFailure
from tests.server.world import Site, error_of, sent

pytestmark = pytest.mark.anyio
RENDERED = "<user>hi🎩\n<assistant>"
EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


async def streamed(client: AsyncOpenAI, **fields: Any) -> list[Any]:
    """The events of a stream, each valid by the client's own models, and numbered without a gap."""
    events = [event async for event in await client.responses.create(stream=True, **fields)]
    kinds: TypeAdapter[Any] = TypeAdapter(openai.types.responses.ResponseStreamEvent)
    for number, event in enumerate(events):
        assert kinds.validate_python(event.to_dict(), strict=True) == event and event.sequence_number == number
    return events


async def test_a_text(client: AsyncOpenAI, server: Site) -> None:
    """A text is a user's turn; the answer is a message of one text with usage, and valid by the client's own model."""
    answer = await client.responses.create(model="base", input="hi🎩", metadata={"a": "b"}, user="me")
    assert Response.model_validate(answer.to_dict(), strict=True) == answer
    assert (answer.output_text, answer.status, answer.error, answer.incomplete_details) == (
        RENDERED, "completed", None, None,
    )  # fmt: skip
    (message,) = answer.output
    assert isinstance(message, ResponseOutputMessage) and message.status == "completed"
    assert (answer.metadata, answer.user, answer.model) == ({"a": "b"}, "me", "base")
    usage, submit = answer.usage, server.engine.submitted[-1]
    assert usage is not None and usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens == len(submit.prompt) and answer.id == f"resp_{answer._request_id}"
    assert (answer.temperature, answer.top_p, submit.sampling.temperature) == (1.0, 1.0, 1.0)


async def test_it_is_chat(client: AsyncOpenAI, server: Site) -> None:
    """Instructions, turns in any form and an answer that comes back are the turns that chat completions have."""
    first = await client.responses.create(model="base", input="hi")
    items: list[Any] = [
        {"role": "developer", "content": "be"},
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "h"}, {"type": "input_text", "text": "i"}],
        },
        *first.output,
        {"role": "user", "content": "bye"},
    ]
    await client.responses.create(model="base", instructions="act", input=items)
    prompt = server.engine.submitted[-1].prompt
    turns: list[Any] = [
        ("system", "act"),
        ("system", "be"),
        ("user", "hi"),
        ("assistant", first.output_text),
        ("user", "bye"),
    ]
    messages: Any = [{"role": role, "content": text} for role, text in turns]
    await client.chat.completions.create(model="base", messages=messages)
    assert server.engine.submitted[-1].prompt == prompt


async def test_a_stream(client: AsyncOpenAI) -> None:
    """A stream has all events in OpenAI's order, and ends with the response that is not streamed."""
    plain = await client.responses.create(model="one@1", input="hi", temperature=0)
    events = await streamed(client, model="one@1", input="hi", temperature=0)
    kinds = [event.type for event in events]
    assert list(dict.fromkeys(kinds)) == EVENTS
    assert [kinds.count(kind) for kind in EVENTS if "delta" not in kind] == [1] * (len(EVENTS) - 1)
    assert "".join(event.delta for event in events if event.type == EVENTS[4]) == plain.output_text
    last = events[-1].response
    assert last.output_text == plain.output_text and last.usage.total_tokens == plain.usage.total_tokens  # type: ignore[union-attr]
    async with client.responses.stream(model="base", input="hi") as stream:
        assert (await stream.get_final_response()).output_text == "<user>hi\n<assistant>"


async def test_it_is_cut(client: AsyncOpenAI) -> None:
    """An answer of the most tokens is incomplete, and says why, whole and streamed."""
    answer = await client.responses.create(model="base", input="hello", max_output_tokens=3)
    last = (await streamed(client, model="base", input="hello", max_output_tokens=3))[-1]
    told: list[dict[str, Any]] = [answer.to_dict(), last.response.to_dict()]
    for found in told:
        assert found["incomplete_details"] == {"reason": "max_output_tokens"} and found["max_output_tokens"] == 3
        (message,) = found["output"]
        assert (found["status"], message["status"], message["content"][0]["text"]) == (
            "incomplete",
            "incomplete",
            "<us",
        )


async def test_logprobs(client: AsyncOpenAI) -> None:
    """Log-probabilities are those of chat completions, in the whole text and in its pieces."""
    asked: dict[str, Any] = {"model": "base", "max_output_tokens": 3, "top_logprobs": 2, "temperature": 0}
    asked |= {"input": "hi", "include": ["message.output_text.logprobs"]}
    answer = await client.responses.create(**asked)
    message = answer.output[0]
    assert isinstance(message, ResponseOutputMessage)
    (part,) = message.content
    assert isinstance(part, ResponseOutputText) and part.logprobs is not None
    chat = await client.chat.completions.create(
        model="base", messages=[{"role": "user", "content": "hi"}], max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert chat.choices[0].logprobs is not None and chat.choices[0].logprobs.content is not None
    assert [one.to_dict() for one in part.logprobs] == [one.to_dict() for one in chat.choices[0].logprobs.content]
    events = await streamed(client, **asked)
    pieces = [one for event in events if event.type == EVENTS[4] for one in event.logprobs]
    assert [one.token for one in pieces] == [one.token for one in part.logprobs]


async def test_several_adapters(client: AsyncOpenAI, server: Site) -> None:
    """The fields that are ours reach the engine through `extra_body`."""
    body = {"adapters": [{"task": "one", "weight": 0.5}], "timeout_s": 9, "seed": 7, "top_k": 3}
    await client.responses.create(model="base", input="hi", extra_body=body)
    submit = server.engine.submitted[-1]
    assert [adapter.weight for adapter in submit.adapters] == [0.5]
    assert (submit.sampling.seed, submit.sampling.top_k) == (7, 3)


async def test_a_failure(client: AsyncOpenAI, server: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error before the first piece is an ordinary one; a later one is the event of a response that failed."""
    monkeypatch.setattr(server.engine, "failure", EngineFailure("overloaded", "too much"))
    with pytest.raises(openai.InternalServerError) as early:
        await client.responses.create(model="base", input="hi", stream=True)
    assert (early.value.status_code, early.value.code) == (503, "overloaded")
    monkeypatch.setattr(server.engine, "failure", None)
    outputs = server.engine._outputs

    def broken(submit: Any) -> list[Any]:
        made = outputs(submit)
        made[2].failure = EngineFailure("deadline_exceeded", "too late")
        return made

    monkeypatch.setattr(server.engine, "_outputs", broken)
    events = await streamed(client, model="base", input="hi")
    failed = events[-1]
    assert (failed.type, failed.response.status, failed.response.error.message) == (
        "response.failed",
        "failed",
        "too late",
    )
    assert (failed.response.error.code, failed.response.output_text) == ("server_error", "<u")


async def test_events_are_named(shared: Site) -> None:
    """Each event of the stream has its type for its name, and no word follows the last."""
    answer = await shared.post("/v1/responses", {"model": "base", "input": "a", "stream": True})
    names = [name for name, _ in sent(answer.text)]
    assert list(dict.fromkeys(names)) == EVENTS and "[DONE]" not in answer.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"include": ["file_search_call.results"]}, "include.0"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input.0.type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"input": "a" * 10**6}, "input"),
        ({"wishes": 1}, "wishes"),
        ({"model": "none"}, "model"),
        ({"model": "one@1", "version": 1}, "version"),
    ],
)
async def test_what_is_refused(shared: Site, fields: dict[str, Any], param: str) -> None:
    """A body that needs a state or what is not served is refused by the field, with OpenAI's statuses."""
    answer = await shared.post("/v1/responses", {"model": "base", "input": "a"} | fields)
    assert (answer.status_code, error_of(answer)["param"]) == (404 if param == "model" else 400, param), answer.text
