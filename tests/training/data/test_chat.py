"""Rows of turns with tools become the tokens that a server gives such turns; what it would not read is refused."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from adapters_store.format.folder import read_folder
from adapters_store.format.manifest import ToolFormatName
from adapters_store.tools.formats import FORMATS
from server.engine.fake import FakeEngineClient
from tests.kit.adapters import make_lora
from tests.kit.tiny import EOS
from tests.server.api.test_manifest import upload
from tests.server.api.test_tools import CALL, CLOCK, TEMPLATE, WEATHER, says, with_template
from tests.server.world import Site, ready_of, serve_site
from training.base import Base, load_base
from training.data.chat import read_chat, tool_format_named
from training.data.dataset import Columns, TokenizedRow, read_dataset, read_training_data, tokenise
from training.data.template import Template
from training.errors import DataError, OptionError

NOW = {"name": "now", "arguments": {}}
ASKED = {"role": "user", "content": "Oslo?"}
GET = {"name": "get_weather", "arguments": {"city": "Oslo"}}
FOUND = {"role": "assistant", "tool_calls": [{"id": "x", "function": GET}]}
TWICE = {"role": "assistant", "content": None, "tool_calls": [NOW | {"arguments": "{}"}, {"function": NOW}]}
RESULT = {"role": "tool", "tool_call_id": "x", "content": "<eos> rain"}
ANSWER = {"role": "assistant", "content": "It rains."}
FORMS: dict[str, Any] = {
    **{str(name): name for name in FORMATS},
    "texts": {"before_tools": "T ", "call_begin": "CALL ", "call_end": "!", "result_begin": "GOT "},
}
ROWS: dict[str, dict[str, Any]] = {
    "a call": {"messages": [ASKED, FOUND], "tools": [WEATHER, CLOCK]},
    "an answer to a result": {"messages": [ASKED, FOUND, RESULT, ANSWER], "tools": [WEATHER]},
    "text and a call": {"messages": [ASKED, FOUND | {"content": "I look."}], "tools": [WEATHER]},
    "reasoning": {"messages": [ASKED, ANSWER | {"reasoning_content": "hm"}]},
    "tools that are not called": {"messages": [ASKED, ANSWER], "tools": [CLOCK]},
    "two calls, as texts": {
        "prompt": [ASKED],
        "completion": [TWICE],
        "tools": json.dumps([CLOCK["function"]]),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """Async tests run on asyncio."""
    return "asyncio"


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose template takes tools, calls and reasoning."""
    thought = "('<think>' + message.reasoning_content + '</think>' if message.reasoning_content else '')"
    template = TEMPLATE.replace("+ message.content", f"+ {thought} + message.content")
    return with_template(tiny_base, tmp_path_factory.mktemp("chat") / "base", template)


@pytest.fixture(scope="module")
def loaded(base: Path) -> Base:
    """The base, loaded for training."""
    return load_base(str(base), "cpu", None, print)


def tokenised(base: Base, file: Path, row: Any, tool_format: str = "") -> TokenizedRow:
    """The tokens of a file of one row."""
    file.write_text(json.dumps(row) + "\n")
    (found,) = tokenise(read_dataset(file, Columns(), Template()), base, 4000, tool_format_named(tool_format))
    return found


@pytest.fixture(scope="module")
async def server(anyio_backend: str, base: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """A server of the base, with a task for each format, whose artifact names it."""
    folder = tmp_path_factory.mktemp("served")
    engine = FakeEngineClient(msgspec.structs.replace(ready_of(base), max_sequence_tokens=4000))
    lora = make_lora(folder / "lora", base, 1, r=2, target_modules=["q_proj"])
    async with serve_site(base, folder / "data", engine) as site:
        for name, tools in FORMS.items():
            await upload(site, base, lora, folder / name, name, tools=tools)
        yield site


@pytest.mark.anyio
@pytest.mark.parametrize("form", ["", *FORMS])
@pytest.mark.parametrize("row", [*ROWS])
async def test_what_is_trained_is_what_is_served(
    server: Site, loaded: Base, tmp_path: Path, form: str, row: str
) -> None:
    """A row's prompt has the tokens that a server gives these turns, and it reads the completion as the row has it."""
    file, fields = tmp_path / "rows.jsonl", ROWS[row]
    (tmp_path / "texts.json").write_text(json.dumps(FORMS["texts"]))
    option = str(tmp_path / "texts.json") if form == "texts" else form
    is_bare = form in FORMATS and FORMATS[msgspec.convert(form, ToolFormatName)].is_bare
    if form and (field := {"reasoning": "reasoning_content", "text and a call": is_bare and "tool_calls"}.get(row)):
        with pytest.raises(DataError, match=f"another '{field}'"):  # which the format cannot write
            tokenised(loaded, file, fields, option)
        return
    made = tokenised(loaded, file, fields, option)
    *turns, wanted = fields.get("messages") or [*fields["prompt"], *fields["completion"]]
    tools = json.loads(fields["tools"]) if isinstance(fields.get("tools"), str) else fields.get("tools", [])
    body = {
        "model": form or "base",
        "messages": [as_sent(turn) for turn in turns],
        "tools": [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools],
        "max_tokens": 1000,
    }
    says(server, bytes(made.completion[:-1]).decode())
    answer = await server.post("/v1/chat/completions", body)
    assert tuple(server.engine.submitted[-1].prompt) == made.ids[: made.num_prompt], answer.text
    message = answer.json()["choices"][0]["message"]
    functions = [call["function"] for call in message.get("tool_calls", [])]
    calls = [(function["name"], json.loads(function["arguments"])) for function in functions]
    assert calls == [(call.name, call.arguments) for call in read_chat("", fields, [*turns, wanted]).answer.calls]
    assert (message["content"] or "", message.get("reasoning_content", "")) == (
        wanted.get("content") or "", wanted.get("reasoning_content", ""),
    )  # fmt: skip
    assert made.completion[-1] == EOS


def as_sent(turn: dict[str, Any]) -> dict[str, Any]:
    """A turn of a row as OpenAI's clients send it: arguments are texts."""
    calls = [dict(call) for call in turn.get("tool_calls", [])]
    for call in calls:
        function = {**call["function"], "arguments": json.dumps(call["function"]["arguments"])}
        call |= {"type": "function", "function": function}
    return {**turn, "tool_calls": calls} if calls else turn


def test_a_run_with_tools(base: Path, tmp_path: Path, command: Callable[..., Any]) -> None:
    """A run on rows with tools writes an artifact that names its format, and none without the option."""
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(ROWS[name]) + "\n" for name in ("a call", "an answer to a result")))
    common = [
        "--base",
        base,
        "--data",
        file,
        "--eval",
        file,
        "--steps",
        1,
        "--layers",
        "all",
        "--max-length",
        4000,
        "--num-answers",
        0,
    ]
    for out, more, tools in (("a", ["--tool-format", "hermes"], "hermes"), ("b", [], None)):
        result = command(*common, "--out", tmp_path / out, *more)
        assert result.exit_code == 0, result.output
        manifest = read_folder(tmp_path / out).manifest
        assert manifest is not None and manifest.tools == tools
    refused = command(*common, "--out", tmp_path / "c", "--tool-format", "hermse")
    assert refused.exit_code == 1 and "--tool-format hermse is none of hermes" in " ".join(refused.output.split())
    (tmp_path / "texts.json").write_text('{"call_begn": "x"}')
    with pytest.raises(OptionError, match="call_begn"):
        tool_format_named(str(tmp_path / "texts.json"))


def test_the_format_is_read_once(loaded: Base, tmp_path: Path) -> None:
    """A file of texts may go once the rows are read: the artifact that is written after the run still names them."""
    rows, texts = tmp_path / "rows.jsonl", tmp_path / "texts.json"
    rows.write_text(json.dumps(ROWS["a call"]) + "\n")
    texts.write_text(json.dumps(FORMS["texts"]))
    common = {"columns": Columns(), "template": Template(), "max_length": 1000}
    options = SimpleNamespace(data=rows, eval=rows, tool_format=str(texts), **common)
    found = read_training_data(options, loaded, 0)
    texts.unlink()
    assert found.has_tools and msgspec.to_builtins(found.tool_format) == FORMS["texts"]


def test_a_template_without_tools(tiny_base: Path, tmp_path: Path) -> None:
    """A base whose template takes no tools refuses such rows, and says how to go on."""
    plain = load_base(str(tiny_base), "cpu", None, print)
    for name, row in ROWS.items():
        with pytest.raises(DataError, match="--tool-format" if name != "reasoning" else "reasoning_content"):
            tokenised(plain, tmp_path / "rows.jsonl", row)
    assert tokenised(plain, tmp_path / "rows.jsonl", ROWS["a call"], "json")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tools": None}, "calls 'get_weather', which 'tools' does not list"),
        ({"tools": "[{"}, "'tools' is not JSON"),
        ({"tools": [{"type": "function"}]}, "'tools' must be a list of functions"),
        ({"tools": 5}, "'tools' must be a list of functions"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"function": {"name": 5}}]}]}, "must have a 'name'"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": "x"}]}, "'tool_calls' must be a list"),
        (
            {"messages": [ASKED, {"role": "assistant", "tool_calls": [NOW | {"arguments": "{"}]}]},
            "'arguments' is not JSON",
        ),
        ({"messages": [ASKED | {"tool_calls": [NOW]}, FOUND]}, "turn 1: 'tool_calls' belongs to a turn of the role"),
        ({"messages": [ASKED | {"reasoning_content": "x"}, FOUND]}, "turn 1: 'reasoning_content' belongs to"),
        ({"messages": [ASKED, RESULT]}, "the last turn must be the assistant's"),
        ({"messages": [ASKED, {"role": "assistant"}]}, "turn 2: 'content' must be text"),
        ({"messages": [ASKED, FOUND | {"content": "a\ud800"}]}, "half of a character"),
        ({"messages": [ASKED, FOUND | {"content": "</think>x"}], "tools": [WEATHER]}, None),
        ({"messages": [ASKED, FOUND | {"content": CALL}]}, "would read another 'tool_calls'"),
        ({"messages": [ASKED, ANSWER | {"content": "<think>a</think>b"}]}, "would read another 'content'"),
    ],
)
def test_rows_that_cannot_be_learned(loaded: Base, tmp_path: Path, change: dict[str, Any], said: str | None) -> None:
    """What is no row with tools, or would be read otherwise, is refused by its line and field."""
    row = {"messages": [ASKED, FOUND], "tools": [WEATHER, CLOCK], **change}
    if said is None:
        assert tokenised(loaded, tmp_path / "rows.jsonl", row)
        return
    with pytest.raises(DataError, match=said) as raised:
        tokenised(loaded, tmp_path / "rows.jsonl", row)
    assert "rows.jsonl line 1" in str(raised.value)


TURNS = [ASKED, ANSWER, ASKED, ANSWER]


def at(number: int, **fields: Any) -> dict[str, Any]:
    """A row of four turns, one of which has more fields."""
    return {"messages": [turn | fields if index == number else turn for index, turn in enumerate(TURNS)]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (at(3, weight=0), "turn 4 has the weight 0, and is the one that is learned"),
        (at(1, weight=1), "turn 2 has the weight 1, and only the last turn is learned"),
        (at(1, weight=0.5), "turn 2: 'weight' must be 0 or 1"),
        (at(1, weight=True), "turn 2: 'weight' must be 0 or 1"),
        (at(0, weight=0), "of a turn of the role 'assistant'"),
        (at(3, train=False), "turn 4: 'train' is not understood: take it out"),
        (at(3, function_call=GET), "turn 4: 'function_call' is not understood: write 'tool_calls'"),
        (at(0, images=["a.png"]), "turn 1: 'images' is not understood"),
        (at(3) | {"functions": [CLOCK["function"]]}, "line 1: 'functions' is not understood: write 'tools'"),
    ],
)
def test_what_a_turn_asks_for_is_done_or_refused(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    """A field that nothing reads is refused with its line, turn and name, unless it asks for nothing."""
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError) as error:
        read_dataset(tmp_path / "rows.jsonl", Columns(), Template())
    assert said in str(error.value) and "line 1" in str(error.value)


def test_what_asks_for_nothing_is_taken(tmp_path: Path) -> None:
    """Weights that say what is done anyway, and empty fields, as the SDKs write them, change nothing."""
    row = at(3, weight=1, refusal=None, audio=None, annotations=[])
    row["messages"][1] = row["messages"][1] | {"weight": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row | {"functions": None}))
    assert read_dataset(tmp_path / "rows.jsonl", Columns(), Template()).examples[0].turns == (
        ("user", "Oslo?"), ("assistant", "It rains."), ("user", "Oslo?"),
    )  # fmt: skip
