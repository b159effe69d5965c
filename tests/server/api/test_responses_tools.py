"""Tools on OpenAI's responses, by its own client: items of reasoning, text and calls, whole, streamed and sent back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from msgspec.structs import replace
from openai import AsyncOpenAI
from openai.types.responses import Response, ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText

from server.core import EngineFailure
from server.engine.fake import FakeEngineClient
from tests.server.api.test_responses import streamed
from tests.server.api.test_tools import CALL, NOW, TEMPLATE, THOUGHT, prompt_of, says, with_template
from tests.server.world import Site, error_of, ready_of, serve_site

pytestmark = pytest.mark.anyio
CITY: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather now",
    "parameters": CITY,
    "strict": False,
}
CLOCK: dict[str, Any] = {"type": "function", "name": "now"}
NAMED: dict[str, Any] = {"type": "function", "name": "now"}
SCHEMA: dict[str, Any] = {
    "type": "json_schema",
    "name": "a",
    "schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
}
USED: dict[str, Any] = {"type": "function_call", "call_id": "x", "name": "now", "arguments": "{}"}
RESULT: dict[str, Any] = {"type": "function_call_output", "call_id": "x", "output": "9"}
MIXED = f"{THOUGHT}I look.\n{CALL}\nAnd more.\n{NOW}\nSo."
KINDS = ["reasoning", "message", "function_call", "message", "function_call", "message"]
OF_TEXT = ["content_part.added", "{}.delta", "{}.done", "content_part.done"]
OF_KIND = {
    "reasoning": [name.format("reasoning_text") for name in OF_TEXT],
    "message": [name.format("output_text") for name in OF_TEXT],
    "function_call": ["function_call_arguments.delta", "function_call_arguments.done"],
}


@pytest.fixture(scope="module")
async def server(anyio_backend: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A server whose base takes tools, in the format hermes, and shows reasoning that comes back."""
    folder = tmp_path_factory.mktemp("tools")
    shown = "{{ '<' + message.role + '>' + (message.reasoning_content or '') + '|' + message.content }}"
    template = TEMPLATE.replace("{{ '<' + message.role + '>' + message.content }}", shown)
    base = with_template(tiny_base, folder / "base", template)
    engine = FakeEngineClient(replace(ready_of(base), max_sequence_tokens=2000))
    async with serve_site(base, folder / "data", engine) as site:
        yield site


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": "base", "input": "Oslo?", "tools": [WEATHER, CLOCK], **fields}


async def ask(client: AsyncOpenAI, **fields: Any) -> Response:
    """A whole answer, held against the client's own models, which are strict here."""
    answer: Response = await client.responses.create(**asked(**fields))
    assert Response.model_validate(answer.to_dict(), strict=True) == answer
    return answer


def calls_of(response: Response) -> list[ResponseFunctionToolCall]:
    return [item for item in response.output if isinstance(item, ResponseFunctionToolCall)]


def texts_of(response: Response) -> list[ResponseOutputText]:
    messages = [item for item in response.output if isinstance(item, ResponseOutputMessage)]
    return [part for message in messages for part in message.content if isinstance(part, ResponseOutputText)]


def items_of(response: Any) -> list[dict[str, Any]]:
    """The items of an output without their ids, each with its one text in the place of its content."""
    items = []
    for item in response.to_dict()["output"]:
        told = {name: value for name, value in item.items() if name not in ("id", "call_id", "content")}
        if "content" in item:
            (text,) = item["content"]
            told["text"] = text["text"]
        items.append(told)
    return items


def text(said: str, status: str = "completed") -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "status": status, "text": said}


def thought(said: str, status: str = "completed") -> dict[str, Any]:
    return {"type": "reasoning", "summary": [], "status": status, "text": said}


def call(name: str, **arguments: str) -> dict[str, Any]:
    return {"type": "function_call", "name": name, "arguments": json.dumps(arguments), "status": "completed"}


EXPECTED = [
    thought("hm"),
    text("I look."),
    call("get_weather", city="Oslo"),
    text("And more."),
    call("now"),
    text("So."),
]


async def test_items_in_order(client: AsyncOpenAI, server: Site) -> None:
    """Reasoning, texts and calls are items in the order in which they were said, with ids of their own; the tools are
    told again, and stood in the prompt as the template writes them."""
    says(server, MIXED)
    answer = await ask(client)
    assert (items_of(answer), answer.status) == (EXPECTED, "completed")
    ids = [str(item.id) for item in answer.output]
    assert len(set(ids)) == len(ids)
    assert [one.partition("_")[0] for one in ids] == ["rs", "msg", "fc", "msg", "fc", "msg"]
    call_ids = [one.call_id for one in calls_of(answer)]
    assert len(set(call_ids)) == 2 and all(one.startswith("call_") for one in call_ids)
    clock = CLOCK | {"description": None, "parameters": None, "strict": False}
    told = answer.to_dict()
    assert (told["tools"], told["tool_choice"], told["parallel_tool_calls"]) == ([WEATHER, clock], "auto", True)
    functions = [
        {"name": "get_weather", "description": "The weather now", "parameters": CITY},
        {"name": "now", "parameters": {"type": "object", "properties": {}}},
    ]
    written = [f"<tool>{json.dumps({'type': 'function', 'function': one})}\n" for one in functions]
    assert prompt_of(server) == "".join([*written, "<user>|Oslo?\n<assistant>"])


async def test_a_call_alone(client: AsyncOpenAI, server: Site) -> None:
    """An answer that only calls has no message; one that says nothing at all has an empty one."""
    says(server, CALL)
    assert items_of(await ask(client)) == [call("get_weather", city="Oslo")]
    says(server, "")
    assert items_of(await ask(client)) == [text("")]
    assert items_of((await streamed(client, **asked()))[-1].response) == [text("")]


async def test_a_stream(client: AsyncOpenAI, server: Site) -> None:
    """A stream tells each item from its beginning to its end before the next, at its index, and adds up to the whole
    answer."""
    says(server, MIXED)
    events = await streamed(client, **asked())
    response = events[-1].response
    assert items_of(response) == EXPECTED
    names = [event.type.removeprefix("response.") for event in events]
    expected = [name for kind in KINDS for name in ["output_item.added", *OF_KIND[kind], "output_item.done"]]
    several = [name for at, name in enumerate(names) if "text.delta" not in name or names[at - 1] != name]
    assert several == ["created", "in_progress", *expected, "completed"]
    for index, item in enumerate(response.output):
        of_item = [event for event in events if getattr(event, "output_index", None) == index]
        added, *told, done = of_item
        assert (added.item.status, done.item) == ("in_progress", item)
        assert {event.item_id for event in told} == {item.id} == {added.item.id}
        assert {event.content_index for event in told if hasattr(event, "content_index")} <= {0}
        said = "".join(event.delta for event in told if event.type.endswith(".delta"))
        whole = item.arguments if item.type == "function_call" else item.content[0].text
        assert said == whole and not (getattr(added.item, "content", None) or getattr(added.item, "arguments", ""))
        assert whole in [getattr(event, "text", getattr(event, "arguments", None)) for event in told]


async def test_the_helper_of_the_client(client: AsyncOpenAI, server: Site) -> None:
    """The client's own helper for streams adds the events up to the same output, whose items come back."""
    says(server, MIXED)
    async with client.responses.stream(**asked()) as stream:
        final: Any = await stream.get_final_response()
    assert [item.type for item in final.output] == KINDS and final.output_text == "I look.And more.So."
    await ask(client, input=[*final.output, {"role": "user", "content": "Bergen?"}])


async def test_the_conversation_goes_on(client: AsyncOpenAI, server: Site) -> None:
    """The items of an answer come back as the client's own objects, with results: they are one turn, and the tools'."""
    says(server, MIXED)
    first = await ask(client)
    says(server, "Rain.")
    results = [
        {"type": "function_call_output", "call_id": item.call_id, "output": output}
        for item, output in zip(
            calls_of(first),
            ["rain", [{"type": "input_text", "text": "no"}, {"type": "input_text", "text": "on"}]],
            strict=True,
        )
    ]
    conversation: list[Any] = [{"role": "user", "content": "Oslo?"}, *first.output, *results]
    answer = await ask(client, input=conversation)
    assert answer.output_text == "Rain."
    calls = (
        '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
        '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    )
    said = f"<user>|Oslo?\n<assistant>hm|I look.\nAnd more.\nSo.{calls}\n<tool>|rain\n<tool>|noon\n<assistant>"
    assert prompt_of(server).endswith(said)
    await ask(client, input=[*conversation, *answer.output, {"role": "user", "content": "Bergen?"}])
    assert prompt_of(server).endswith("<tool>|noon\n<assistant>|Rain.\n<user>|Bergen?\n<assistant>")


@pytest.mark.parametrize(
    ("items", "written"),
    [
        (["a", "b"], "<assistant>|a\n<assistant>|b\n"),
        ([{"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}, "a"], "<assistant>s|a\n"),
        (["a", {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "r"}]}, "b"],
         "<assistant>|a\n<assistant>r|b\n"),
        ([{"type": "reasoning", "summary": []}, USED, RESULT, "a"],
         '<assistant>|<tool_call>{"name": "now", "arguments": {}}</tool_call>\n<tool>|9\n<assistant>|a\n'),
    ],
)  # fmt: skip
async def test_turns_of_items(client: AsyncOpenAI, server: Site, items: list[Any], written: str) -> None:
    """Reasoning begins a turn, a text behind a text is another, and a result ends one."""
    said = [{"role": "assistant", "content": one} if isinstance(one, str) else one for one in items]
    await ask(client, input=said, tools=openai.omit)
    assert prompt_of(server) == f"{written}<assistant>"


async def test_one_call_alone(client: AsyncOpenAI, server: Site) -> None:
    """Without parallel calls the answer ends with its first one, whole and streamed."""
    says(server, f"{CALL}\n{NOW} and more")
    answer = await ask(client, parallel_tool_calls=False)
    last = (await streamed(client, **asked(parallel_tool_calls=False)))[-1].response
    assert items_of(answer) == items_of(last) == [call("get_weather", city="Oslo")]
    assert (answer.parallel_tool_calls, answer.status) == (False, "completed")


async def test_calls_that_must_be(client: AsyncOpenAI, server: Site) -> None:
    """An answer that must call is held to a grammar of calls: of all functions, or of the named one; auto to none."""
    says(server, CALL)
    several: list[tuple[Any, set[str]]] = [("required", {"get_weather", "now"}), (NAMED, {"now"}), ("auto", set())]
    for choice, names in several:
        answer = await ask(client, tool_choice=choice)
        form = server.engine.submitted[-1].form or ""
        assert {name for name in ("get_weather", "now") if f'{{"const": "{name}"}}' in form} == names
        assert answer.to_dict()["tool_choice"] == choice
    await ask(client, tools=[WEATHER | {"strict": True}])
    assert "(free" in (server.engine.submitted[-1].form or "")


async def test_no_calls(client: AsyncOpenAI, server: Site) -> None:
    """Without tools, or with tool_choice none, the prompt has none, and what looks like a call is text."""
    says(server, CALL)
    several: list[dict[str, Any]] = [{"tools": openai.omit}, {"tool_choice": "none"}, {"tools": []}]
    for fields in several:
        assert items_of(await ask(client, **fields)) == [text(CALL)]
        assert prompt_of(server) == "<user>|Oslo?\n<assistant>"


async def test_a_form_beside_tools(client: AsyncOpenAI, server: Site) -> None:
    """A text has the form that is asked for, behind reasoning, and an answer may call instead."""
    says(server, f'{THOUGHT}{{"a": 1}}')
    answer = await ask(client, text={"format": SCHEMA})
    assert items_of(answer) == [thought("hm"), text('{"a": 1}')]
    form = server.engine.submitted[-1].form or ""
    assert "thought" in form and "get_weather" in form and '{"a": {"type": "integer"}}' in form
    await ask(client, text={"format": SCHEMA}, tools=openai.omit)
    form = server.engine.submitted[-1].form or ""
    assert "thought" in form and "get_weather" not in form


async def test_it_is_cut(client: AsyncOpenAI, server: Site) -> None:
    """An answer that is cut has its last item incomplete: reasoning, text, or a call that broke off and is text."""
    says(server, MIXED)
    head = len(f"{THOUGHT}I look.\n")
    several = [
        (10, [thought("hm", "incomplete")]),
        (head - 1, [thought("hm"), text("I look.", "incomplete")]),
        (head + 16, [thought("hm"), text("I look.\n<tool_call>\n{\"na", "incomplete")]),
        (head + len(CALL), [thought("hm"), text("I look."), call("get_weather", city="Oslo")]),
    ]  # fmt: skip
    for limit, expected in several:
        answer = await ask(client, max_output_tokens=limit)
        last = (await streamed(client, **asked(max_output_tokens=limit)))[-1].response
        assert (items_of(answer), answer.status) == (items_of(last), last.status) == (expected, "incomplete")


async def test_a_failure(client: AsyncOpenAI, server: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that fails tells the items until then: those that were whole, and the one that was not."""
    says(server, MIXED)
    outputs, at = server.engine._outputs, len(f"{THOUGHT}I look.\n{CALL}\nAnd m")

    def broken(submit: Any) -> list[Any]:
        made = outputs(submit)
        made[at].failure = EngineFailure("deadline_exceeded", "too late")
        return made

    monkeypatch.setattr(server.engine, "_outputs", broken)
    failed = (await streamed(client, **asked()))[-1]
    assert (failed.type, items_of(failed.response)) == (
        "response.failed",
        [*EXPECTED[:3], text("And m", "incomplete")],
    )


async def test_logprobs(client: AsyncOpenAI, server: Site) -> None:
    """The log-probabilities of a text are those of its own tokens, and of what was dropped before it; none is of a
    call's. The token that ends an answer counts with its text."""
    says(server, f"I look.\n{CALL}\nSo.")
    fields: dict[str, Any] = {"include": ["message.output_text.logprobs"], "temperature": 0}
    answer = await ask(client, **fields)
    events = await streamed(client, **asked(**fields))
    for response in (answer, events[-1].response):
        told = ["".join(one.token for one in part.logprobs or []) for part in texts_of(response)]
        assert told[0] == "I look." and told[1].strip("\n").startswith("So.") and CALL not in told[1]
    pieces = [one.token for event in events if event.type.endswith("output_text.delta") for one in event.logprobs]
    assert pieces == [one.token for part in texts_of(answer) for one in part.logprobs or []]
    says(server, "Rain.")
    for plain in (await ask(client, **fields), (await streamed(client, **asked(**fields)))[-1].response):
        (part,) = texts_of(plain)
        assert plain.usage is not None and len(part.logprobs or []) == plain.usage.output_tokens == len("Rain.") + 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type"),
        ({"tools": [{"type": "mcp", "server_label": "x", "server_url": "y"}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "name": "a b"}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools.0.function"),
        ({"tools": [CLOCK | {"parameters": {"type": "array"}}]}, "tools.0"),
        ({"tools": [CLOCK | {"parameters": {"properties": {"a": {"if": 1}}}, "strict": True}]},
         "tools.0.parameters#/properties/a/if"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "sell"}}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice.type"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        ({"input": [RESULT]}, "input.0.call_id"),
        ({"input": [RESULT, USED]}, "input.0.call_id"),
        ({"input": [USED, {"type": "function_call_output", "output": "9"}]}, "input.1.call_id"),
        ({"input": [USED, RESULT | {"output": [{"type": "input_image"}]}]}, "input.1.output.0.type"),
        ({"input": [USED | {"arguments": "[]"}]}, "input.0.arguments"),
        ({"input": [USED | {"arguments": "{"}]}, "input.0.arguments"),
        ({"input": [USED | {"name": "a b"}]}, "input.0.name"),
        ({"input": [{"type": "function_call", "name": "now", "arguments": "{}"}]}, "input.0.call_id"),
        ({"input": [{"type": "reasoning", "encrypted_content": "x"}]}, "input.0.encrypted_content"),
        ({"input": [{"type": "reasoning", "content": [{"type": "text", "text": "x"}]}]}, "input.0.content.0.type"),
        ({"input": [{"type": "computer_call", "call_id": "x"}]}, "input.0.type"),
        ({"input": ["x"]}, "input.0"),
    ],
)  # fmt: skip
async def test_refusals(server: Site, fields: dict[str, Any], param: str) -> None:
    """Tools, calls and results that cannot be are 400, by the name of the field."""
    answer = await server.post("/v1/responses", asked() | fields)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text


async def test_an_item_of_no_known_kind(server: Site) -> None:
    """An item of another kind is refused with the kinds that there are."""
    answer = await server.post("/v1/responses", asked(input=[{"type": "computer_call", "call_id": "x"}]))
    assert "message, function_call, function_call_output, reasoning" in error_of(answer)["message"]


async def test_a_base_without_tools(tiny_base: Path, tmp_path: Path) -> None:
    """A template that writes no tools refuses them, and their calls and results, by name."""
    async with serve_site(tiny_base, tmp_path) as plain:
        for fields, param in (({"tools": [CLOCK]}, "tools"), ({"input": [USED, RESULT]}, "input")):
            answer = await plain.post("/v1/responses", {"model": "base", "input": "Oslo?", **fields})
            assert (answer.status_code, error_of(answer)["param"]) == (400, param)
            assert "chat template writes no tools" in error_of(answer)["message"]
