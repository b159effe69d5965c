"""Tools through OpenAI's own client: written into the prompt, read from the answer, streamed, sent back."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
from msgspec.structs import replace
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from server.engine.fake import FakeEngineClient
from server.engine.messages import Submit
from tests.kit.tiny import CHAT_TEMPLATE, EOS
from tests.server.api.test_manifest import upload
from tests.server.world import Site, error_of, ready_of, serve_site

pytestmark = pytest.mark.anyio
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
ASKED: list[Any] = [{"role": "user", "content": "Oslo?"}]
SCHEMA: dict[str, Any] = {
    "type": "json_schema",
    "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
USED: dict[str, Any] = {"id": "x", "type": "function", "function": {"name": "now", "arguments": "{}"}}
THOUGHT = "<think>\nhm\n</think>\n\n"
TEMPLATE = (
    "{% for tool in tools or [] %}{{ '<tool>' + tool | tojson + '\n' }}{% endfor %}{% for message in messages %}"
    "{{ '<' + message.role + '>' + message.content }}{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}{# it thinks between <think> and </think> #}"
)


def with_template(base: Path, folder: Path, template: str) -> Path:
    """A copy of a base with another chat template."""
    shutil.copytree(base, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
async def server(anyio_backend: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A server whose base takes tools, in the format hermes, and reasons."""
    folder = tmp_path_factory.mktemp("tools")
    base = with_template(tiny_base, folder / "base", TEMPLATE)
    engine = FakeEngineClient(replace(ready_of(base), max_sequence_tokens=2000))
    async with serve_site(base, folder / "data", engine) as site:
        yield site


@pytest.fixture(scope="module")
async def plain(
    anyio_backend: str, tiny_base: Path, loras: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Site]:
    """A server whose base takes no tools, with the task `mine`, whose artifact has texts for them."""
    folder = tmp_path_factory.mktemp("plain")
    texts = {"before_tools": "Tools:\n", "call_begin": "CALL ", "call_end": ";", "result_begin": "GOT "}
    async with serve_site(tiny_base, folder / "data") as site:
        around = {"before": "<think>", "after": "</think>"}
        await upload(site, tiny_base, loras[0], folder / "lora", "mine", tools=texts, reasoning=around)
        yield site


def says(site: Site, text: str) -> None:
    """Let the engine answer with a text."""

    def answer(_submit: Submit) -> list[int]:
        return [*text.encode(), EOS]

    site.engine._answer = answer


def prompt_of(site: Site) -> str:
    """The prompt that the engine got last."""
    return bytes(token for token in site.engine.submitted[-1].prompt if token < 256).decode()


async def ask(client: AsyncOpenAI, **fields: Any) -> ChatCompletion:
    """An answer that is whole; every one is held against the client's own models, which are strict here."""
    body: dict[str, Any] = {"model": "base", "messages": ASKED, "tools": [WEATHER, CLOCK], **fields}
    answer: ChatCompletion = await client.chat.completions.create(**body)
    ChatCompletion.model_validate(answer.to_dict(), strict=True)
    return answer


async def streamed(client: AsyncOpenAI, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The message that a stream adds up to, and its deltas."""
    body: dict[str, Any] = {"model": "base", "messages": ASKED, "tools": [WEATHER, CLOCK], **fields, "stream": True}
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "calls": [], "finish": None}
    deltas = []
    async for chunk in await client.chat.completions.create(**body):
        assert isinstance(chunk, ChatCompletionChunk)
        (choice,) = chunk.choices
        delta = choice.delta.to_dict()
        deltas.append(delta)
        for name in ("content", "reasoning_content"):
            message[name] += delta.get(name) or ""
        for call in choice.delta.tool_calls or []:
            assert call.function is not None
            if call.id is not None:
                assert (call.index, call.type) == (len(message["calls"]), "function")
                message["calls"].append([call.function.name, ""])
            message["calls"][call.index][1] += call.function.arguments or ""
        message["finish"] = choice.finish_reason or message["finish"]
    return message, deltas


async def test_a_call(client: AsyncOpenAI, server: Site) -> None:
    """A model that calls is told of with OpenAI's fields; the tools stood in its prompt as the template writes them."""
    says(server, f"I look.\n{CALL}")
    (choice,) = (await ask(client, tool_choice="auto")).choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", "I look.")
    (call,) = choice.message.tool_calls or []
    assert call.type == "function" and call.id.startswith("call_")
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Oslo"})
    clock = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}
    lines = [*(f"<tool>{json.dumps(tool)}\n" for tool in (WEATHER, clock)), "<user>Oslo?\n<assistant>"]
    assert prompt_of(server) == "".join(lines)


async def test_the_conversation_goes_on(client: AsyncOpenAI, server: Site) -> None:
    """A call comes back with its result, as the client's own objects, and the model reads both."""
    says(server, CALL)
    message = (await ask(client)).choices[0].message
    assert message.content is None and message.tool_calls
    says(server, "Rain.")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"}
    answer = await ask(client, messages=[*ASKED, message, result])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("Rain.", "stop")
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert prompt_of(server).endswith(f"<user>Oslo?\n<assistant>{call}\n<tool>rain\n<assistant>")


async def test_a_stream(client: AsyncOpenAI, server: Site) -> None:
    """A stream gives reasoning, content, and of each call first its name and then its arguments."""
    says(server, f"{THOUGHT}I look.\n{CALL}\n{NOW}")
    message, deltas = await streamed(client)
    assert message == {
        "content": "I look.",
        "reasoning_content": "hm",
        "calls": [["get_weather", '{"city": "Oslo"}'], ["now", "{}"]],
        "finish": "tool_calls",
    }
    assert [delta["role"] for delta in deltas if "role" in delta] == ["assistant"]
    (first,) = [delta["tool_calls"][0] for delta in deltas if "tool_calls" in delta][:1]
    assert (first["function"]["name"], first["function"]["arguments"]) == ("get_weather", "")


async def test_answers_of_their_own(client: AsyncOpenAI, server: Site) -> None:
    """Each of several answers counts its own calls, whole and streamed, and tells its log-probabilities."""
    says(server, NOW)
    choices = (await ask(client, n=2)).choices
    assert [[call.type for call in choice.message.tool_calls or []] for choice in choices] == [["function"]] * 2
    assert len({call.id for choice in choices for call in choice.message.tool_calls or []}) == 2


async def test_one_call_alone(client: AsyncOpenAI, server: Site) -> None:
    """Without parallel calls the answer ends with its first one, and no more of it is generated."""
    says(server, f"{CALL}\n{NOW} and more")
    (choice,) = (await ask(client, parallel_tool_calls=False)).choices
    assert (len(choice.message.tool_calls or []), choice.finish_reason) == (1, "tool_calls")
    assert server.engine.aborted[-1] == server.engine.submitted[-1].sequence_id
    message, _ = await streamed(client, parallel_tool_calls=False)
    assert [name for name, _ in message["calls"]] == ["get_weather"]


async def test_no_tools_no_calls(client: AsyncOpenAI, server: Site) -> None:
    """Without tools, or with tool_choice none, the prompt has none, and what looks like a call is content."""
    says(server, CALL)
    several: list[dict[str, Any]] = [{"tools": openai.omit}, {"tool_choice": "none"}, {"tools": []}]
    for fields in several:
        (choice,) = (await ask(client, **fields)).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (CALL, None, "stop")
        assert prompt_of(server) == "<user>Oslo?\n<assistant>"


async def test_reasoning(client: AsyncOpenAI, server: Site) -> None:
    """Reasoning is apart from content, or left out if the request says so; an answer that was cut may be all of it."""
    says(server, f"{THOUGHT}Yes.")
    message = (await ask(client, tools=openai.omit)).choices[0].message
    assert (message.content, message.to_dict()["reasoning_content"]) == ("Yes.", "hm")
    silent = (await ask(client, tools=openai.omit, extra_body={"include_reasoning": False})).choices[0].message
    assert (silent.content, "reasoning_content" in silent.to_dict()) == ("Yes.", False)
    cut = (await ask(client, max_tokens=10)).choices[0]
    assert (cut.message.content, cut.message.to_dict()["reasoning_content"], cut.finish_reason) == ("", "hm", "length")


async def test_calls_that_must_be(client: AsyncOpenAI, server: Site) -> None:
    """An answer that must call is held to a grammar of calls: of all functions, or of the named one; auto to none."""
    says(server, CALL)
    for choice, names in (
        ("required", {"get_weather", "now"}),
        ({"type": "function", "function": {"name": "now"}}, {"now"}),
        ("auto", set()),
    ):
        answer = await ask(client, tool_choice=choice)
        form = server.engine.submitted[-1].form or ""
        assert {name for name in ("get_weather", "now") if f'{{"const": "{name}"}}' in form} == names
        assert ("start:  whole" in form or "thought" in form) == bool(names)
        assert answer.choices[0].finish_reason == "tool_calls"


async def test_strict_functions(client: AsyncOpenAI, server: Site) -> None:
    """A strict function holds calls to their schemas also where none must be, with free text around them."""
    says(server, "Hm.")
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    answer = await ask(client, tools=[strict, CLOCK])
    assert answer.choices[0].message.content == "Hm."
    assert "(free" in (server.engine.submitted[-1].form or "")


async def test_a_form_beside_tools(client: AsyncOpenAI, server: Site) -> None:
    """Content has the form that is asked for, and an answer may call instead; one that must call has no content."""
    says(server, f'{THOUGHT}{{"a": 1}}')
    message = (await ask(client, response_format=SCHEMA)).choices[0].message
    assert (message.content, message.to_dict()["reasoning_content"]) == ('{"a": 1}', "hm")
    form = server.engine.submitted[-1].form or ""
    assert "thought" in form and "get_weather" in form and '{"a": {"type": "integer"}}' in form
    says(server, CALL)
    assert (await ask(client, response_format=SCHEMA)).choices[0].message.tool_calls
    assert (await ask(client, response_format=SCHEMA, tool_choice="required")).choices[0].message.tool_calls
    assert '{"a": {"type": "integer"}}' not in (server.engine.submitted[-1].form or "")


async def test_reasoning_before_a_form(client: AsyncOpenAI, server: Site) -> None:
    """A base that reasons may do so before content in a form, without tools too."""
    says(server, f'{THOUGHT}{{"a": 1}}')
    message = (await ask(client, tools=openai.omit, response_format=SCHEMA)).choices[0].message
    assert (message.content, message.to_dict()["reasoning_content"]) == ('{"a": 1}', "hm")
    assert "thought" in (server.engine.submitted[-1].form or "")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER, WEATHER]}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "sell"}}}, "tool_choice"),
        ({"messages": [{"role": "tool", "tool_call_id": "x", "content": "y"}]}, "messages.0.tool_call_id"),
        ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
        (
            {"response_format": SCHEMA | {"json_schema": {"name": "a", "schema": {"if": 1}}}},
            "response_format.json_schema.schema#/if",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": 1}}}}]},
            "tools.0.function",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"required": "a"}}}]},
            "tools.0.function",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools.0.function",
        ),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": {"if": 1}}}}}
                ],
                "tool_choice": "required",
            },
            "tools.0.function.parameters#/properties/a/if",
        ),
        ({"messages": [{"role": "tool", "content": "y"}]}, "messages.0.tool_call_id"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content"),
        ({"messages": [*ASKED, {"role": "user", "content": "x", "tool_calls": [USED]}]}, "messages.1.tool_calls"),
        ({"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}, "messages.0.reasoning_content"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "y"}]}, "messages.0.tool_call_id"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [{"id": "x", "type": "function", "function": {"name": "now", "arguments": "[]"}}],
                    }
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
        ),
    ],
)
async def test_refusals(server: Site, fields: dict[str, Any], param: str) -> None:
    """Tools and calls that cannot be are 400, by the name of the field."""
    body = {"model": "base", "messages": ASKED, "tools": [WEATHER], **fields}
    answer = await server.post("/v1/chat/completions", body)
    assert (answer.status_code, error_of(answer)["param"]) == (400, param), answer.text


async def test_a_base_without_tools(plain: Site) -> None:
    """A template that writes no tools refuses them, and their calls and results, by name."""
    call = {"id": "x", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    turns = [*ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "x", "content": "9"}]
    for fields, param in (({"tools": [CLOCK]}, "tools"), ({"messages": turns}, "messages")):
        answer = await plain.post("/v1/chat/completions", {"model": "base", "messages": ASKED, **fields})
        assert (answer.status_code, error_of(answer)["param"]) == (400, param)
        assert "chat template writes no tools" in error_of(answer)["message"]


async def test_the_texts_of_an_artifact(plain: Site) -> None:
    """An artifact's own texts write tools, calls and results, and read calls; its reasoning is apart."""
    says(plain, '<think>a</think>CALL {"name": "now", "arguments": {}};')
    call = {"id": "x", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    turns = [*ASKED, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "x", "content": "9"}]
    answer = await plain.post("/v1/chat/completions", {"model": "mine", "messages": turns, "tools": [CLOCK]})
    message = answer.json()["choices"][0]["message"]
    assert (message["content"], message["reasoning_content"]) == (None, "a")
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
    tool = '{"name": "now", "parameters": {"type": "object", "properties": {}}}'
    written = 'CALL {"name": "now", "arguments": {"a": 1}};'
    assert prompt_of(plain) == f"<system>Tools:\n{tool}\n<user>Oslo?\n<assistant>{written}\n<user>GOT 9\n<assistant>"


async def test_a_format_by_setting(tiny_base: Path, tmp_path: Path) -> None:
    """A setting names the format: of a template that shows another, and of one that takes no tools."""
    shown = "{{ tools | tojson if tools }}" + CHAT_TEMPLATE
    for template in (shown, CHAT_TEMPLATE):
        base = with_template(tiny_base, tmp_path / str(len(template)), template)
        data = tmp_path / f"data{len(template)}"
        async with serve_site(base, data, tool_format="pythonic") as site:
            says(site, "[now()]")
            body = {"model": "base", "messages": ASKED, "tools": [CLOCK]}
            choice = (await site.post("/v1/chat/completions", body)).json()["choices"][0]
            assert choice["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": "{}"}
            assert ("[NAME(ARGUMENT=VALUE" in prompt_of(site)) == (template == CHAT_TEMPLATE)


async def test_tokens_of_a_prompt_with_tools(server: Site) -> None:
    """POST /tokenize counts tools as the chat route does."""
    body = {"model": "base", "messages": ASKED, "tools": [WEATHER]}
    counted = (await server.post("/tokenize", body)).json()["tokens"]
    await server.post("/v1/chat/completions", body)
    assert counted == server.engine.submitted[-1].prompt


async def test_generate_with_tools(server: Site) -> None:
    """POST /generate takes tools in a chat, and tells reasoning, text and calls apart, whole and streamed."""
    says(server, f"{THOUGHT}I look.\n{CALL}\n{NOW}")
    body: dict[str, Any] = {"messages": ASKED, "tools": [WEATHER, CLOCK], "max_tokens": 500}
    (choice,) = (await server.post("/generate?task=base", body)).json()["choices"]
    said = (choice["text"], choice["reasoning_content"], choice["finish_reason"])
    assert said == ("I look.", "hm", "tool_calls") and len(choice["token_ids"]) > 100
    functions = [call["function"] for call in choice["tool_calls"]]
    assert functions == [
        {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
        {"name": "now", "arguments": "{}"},
    ]
    events = await server.events(**body)
    assert "".join(event["text"] for event in events) == "I look."
    assert "".join(event.get("reasoning_content", "") for event in events) == "hm"
    assert [call["function"] for event in events for call in event.get("tool_calls", [])] == functions
    assert [token for event in events for token in event["token_ids"]] == choice["token_ids"]
    result = {"role": "tool", "tool_call_id": choice["tool_calls"][0]["id"], "content": "rain"}
    turn = {"role": "assistant", "content": choice["text"], "tool_calls": choice["tool_calls"]}
    says(server, "Rain.")
    answer = await server.post("/generate?task=base", body | {"messages": [*ASKED, turn, result]})
    assert answer.json()["choices"][0]["text"] == "Rain."
    assert prompt_of(server).endswith("<tool>rain\n<assistant>")


async def test_generate_shows_all_without_tools(server: Site) -> None:
    """Without tools the text of POST /generate is all that was generated."""
    says(server, f"{THOUGHT}{CALL}")
    (choice,) = (await server.post("/generate?task=base", {"messages": ASKED})).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (f"{THOUGHT}{CALL}", "stop")
    refused = await server.post("/generate?task=base", {"prompt": "Oslo?", "tools": [CLOCK]})
    assert (refused.status_code, error_of(refused)["param"]) == (422, "tools")
