"""Answers are parsed into reasoning, content and calls, whatever pieces they come in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters_store.format.manifest import ToolTexts
from adapters_store.tools.formats import FORMATS, ToolCall, ToolFormat
from adapters_store.tools.parser import MAX_MISSES, AnswerFormat, AnswerParser, AnswerText, CallPart, Part

OWN = ToolFormat("json", ToolTexts("Tools:\n", "CALL ", " END", "RESULT ", ""))
ALL: dict[str, ToolFormat] = {**{str(name): form for name, form in FORMATS.items()}, "own": OWN}
STRING, NUMBER = {"type": "string"}, {"type": ["number", "boolean", "null", "array", "object"]}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "get_weather": {"type": "object", "properties": {"city": STRING, "days": NUMBER}},
    "math.add": {
        "type": "object",
        "properties": {"a": NUMBER, "b": {"anyOf": [{"type": "integer"}, {"enum": [None]}]}},
    },
    "now": {},
}
THINK = ("<think>", "</think>")

texts = st.text(st.sampled_from("ab \n\"'\\{}[]()<>/,;:=é🎩"), max_size=12)
values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 10**17) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
# An argument that may not be text is none of JSON's texts: Qwen3-coder's form does not tell the two apart.
arguments = st.fixed_dictionaries(
    {}, optional={"city": texts, "days": values.filter(lambda one: not isinstance(one, str))}
)
calls = st.builds(ToolCall, st.just("get_weather"), arguments, st.just("")) | st.just(ToolCall("now", {}))


def cut(data: st.DataObject, text: str) -> list[str]:
    """Cut a text at places that hypothesis draws."""
    places = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[begin:end] for begin, end in pairwise([0, *places, len(text)])]


def parsed(answer_format: AnswerFormat, pieces: Sequence[str]) -> tuple[str, str, list[tuple[str, Any]]]:
    """The reasoning, the content and the calls (name, arguments) of an answer that comes in pieces."""
    parser, parts = AnswerParser(answer_format), list[Part]()
    for piece in pieces:
        parts += [] if parser.has_ended else parser.push(piece)
    parts += [] if parser.has_ended else parser.finish()
    found = [part for part in parts if isinstance(part, CallPart)]
    assert [part.number for part in found] == [*range(len(found))]
    said = {kind: "".join(part.text for part in parts if part[0] == kind) for kind in ("reasoning", "content")}
    return said["reasoning"], said["content"], [(part.name, json.loads(part.arguments)) for part in found]


def asked(name: str, **fields: Any) -> AnswerFormat:
    """The parts of an answer in a format of the table, with the functions of these tests."""
    return AnswerFormat(ALL[name], FUNCTIONS, **fields)


@settings(max_examples=80, deadline=None)
@given(name=st.sampled_from([*ALL]), data=st.data())
def test_calls_that_a_format_writes_are_read(name: str, data: st.DataObject) -> None:
    """Calls as a format writes them are read back, in any pieces, and beside marked calls text is content."""
    wanted = data.draw(st.lists(calls, min_size=1, max_size=3))
    if name == "qwen3_coder":
        wanted = [call for call in wanted if "</parameter>" not in str(call.arguments.get("city"))]
    before = "" if ALL[name].is_bare else data.draw(st.sampled_from(["", "I look it up.\n\n"]))
    reasoning = data.draw(st.sampled_from(["", "hm <"]))
    thought = f"<think>\n{reasoning}\n</think>\n\n" if reasoning else ""
    text = thought + before + ALL[name].write_calls(wanted)
    found = parsed(asked(name, reasoning=THINK), cut(data, text))
    assert found == (reasoning, before.strip(), [(call.name, call.arguments) for call in wanted])


fragments = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "[ARGS]", "<function=", "<parameter=", "</parameter>", ">"),
        *("</function>", "<think>", "</think>", "CALL ", " END", "<|python_tag|>", "get_weather", "now", "(", ")", "="),
        *('{"name": "now"}', '{"name": "now", "arguments": {}}', '{"name": "sell", "arguments": {}}', "[now()]", "; "),
        *("{", "}", "[", "]", '"', "'", "\\", ",", ":", " ", "\n", "x", "<", "city", '"city": "', "[CALL_ID]", "é"),
    ]
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([*ALL]), data=st.data())
def test_pieces_change_nothing(name: str, data: st.DataObject) -> None:
    """Any text gives the same parts in any pieces, and no character of it is lost that is not of a call."""
    text = "".join(data.draw(st.lists(fragments, max_size=12)))
    answer_format = asked(name, reasoning=data.draw(st.sampled_from([None, THINK])))
    whole = parsed(answer_format, [text])
    assert parsed(answer_format, cut(data, text)) == whole
    assert parsed(answer_format, [*text]) == whole
    reasoning, content, found = whole
    if not found and not reasoning and answer_format.reasoning is None:
        assert content == text


NO_CALLS = {
    "another function": '<tool_call>\n{"name": "sell", "arguments": {}}\n</tool_call>',
    "arguments that are no JSON": '<tool_call>\n{"name": "now", "arguments": {1}}\n</tool_call>',
    "arguments that are no object": '<tool_call>\n{"name": "now", "arguments": [1]}\n</tool_call>',
    "a call that breaks off": '<tool_call>\n{"name": "now", "argum',
    "a call that is not closed": '<tool_call>\n{"name": "now", "arguments": {}} and more',
    "no name": '<tool_call>\n{"arguments": {}}\n</tool_call>',
    "no number": '<tool_call>\n{"name": "now", "arguments": {"a": NaN}}\n</tool_call>',
    "no call at all": "<tool_call> is how a call begins.",
}


@pytest.mark.parametrize("text", NO_CALLS.values(), ids=NO_CALLS)
def test_what_is_no_call_is_content(text: str) -> None:
    """Text that is no call of a given function stays content, and a call after it is read."""
    assert parsed(asked("hermes"), [text]) == ("", text, [])
    good = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    if not text.endswith("argum"):
        assert parsed(asked("hermes"), [text, good]) == ("", text, [("now", {})])


WRITTEN = {  # as bases write them, beside what the table itself writes
    "JSON within JSON": ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"a\\": 1}"}</tool_call>', {"a": 1}),
    "no end mark": ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1}}', {"a": 1}),
    "a function within": ("json", '{"type": "function", "function": {"name": "now", "arguments": {"a": 1}}}', {"a": 1}),
    "a python tag": ("llama3", '<|python_tag|>{"name": "now", "parameters": {"a": 1}}', {"a": 1}),
    "a function's name alone": ("llama3", '{"function": "now", "parameters": {"a": 1}}', {"a": 1}),
    "the other key": ("json", '[{"name": "now", "parameters": {"a": 1}}]', {"a": 1}),
    "an id within": ("mistral_v11", '[TOOL_CALLS]now[CALL_ID]aB3aB3aB3[ARGS]{"a": 1}', {"a": 1}),
    "no word before the arguments": ("mistral_v11", '[TOOL_CALLS]now{"a": 1}', {"a": 1}),
    "a list in the newer format": ("mistral_v11", '[TOOL_CALLS] [{"name": "now", "arguments": {"a": 1}}]', {"a": 1}),
    "no outer mark": ("qwen3_coder", "<function=now><parameter=a>1</parameter></function>", {"a": "1"}),
    "words of JSON": ("pythonic", "[now(a=true, b=[null, 'x'], )]", None),
    "words of Python": ("pythonic", "[now(a=(1, None), b={'x': False})]", {"a": [1, None], "b": {"x": False}}),
}


@pytest.mark.parametrize(("name", "text", "wanted"), WRITTEN.values(), ids=WRITTEN)
def test_other_ways_to_write_calls(name: str, text: str, wanted: Any) -> None:
    """Calls are read as bases write them, not only as the table does; what mixes two languages is no call."""
    calls_read = [] if wanted is None else [("now", wanted)]
    assert parsed(asked(name), [text]) == ("", text if wanted is None else "", calls_read)


def test_types_of_xml_arguments() -> None:
    """Text of an argument becomes what its schema says: JSON or Python's words, and text if it may be text."""
    text = "<function=math.add><parameter=a>\nTrue\n</parameter><parameter=b>\n7\n</parameter></function>"
    assert parsed(asked("qwen3_coder"), [text])[2] == [("math.add", {"a": True, "b": 7})]
    text = "<function=get_weather><parameter=city>\n7\n</parameter><parameter=days>\n[1]\n</parameter></function>"
    assert parsed(asked("qwen3_coder"), [text])[2] == [("get_weather", {"city": "7", "days": [1]})]


MIXED = {
    "properties": {
        "a": {"enum": ["2", 2.5, None, True, [1, {"b": "c"}]]},
        "b": {"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/unit"}, {"type": "array"}]},
        "c": {"$ref": "#/$defs/number"},
    },
    "$defs": {"unit": {"enum": ["x", "7"]}, "number": {"type": "number"}},
}


@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        *(("a", "2", "2"), ("a", "2.5", 2.5), ("a", "None", None), ("a", "True", True), ("a", "true", True)),
        *(("a", '[1,{"b":"c"}]', [1, {"b": "c"}]), ("a", "other", "other"), ("b", "7", 7), ("b", "x", "x")),
        *(("b", "[7]", [7]), ("b", "y", "y"), ("c", "7", 7), ("c", "y", "y")),
    ],
)
def test_values_of_several_types(key: str, text: str, wanted: Any) -> None:
    """A text becomes the value that its schema lists, refers to or has among several; else it stays text."""
    answer = f"<tool_call><function=f><parameter={key}>{text}</parameter></function></tool_call>"
    found = parsed(AnswerFormat(ALL["qwen3_coder"], {"f": MIXED}), [answer])
    assert found == ("", "", [("f", {key: wanted})]) and type(found[2][0][1][key]) is type(wanted)


def test_one_call_ends_the_answer() -> None:
    """An answer that may have one call has ended with it."""
    parser = AnswerParser(asked("hermes", is_parallel=False))
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    parts = parser.push(f"Well. {call}{call} more")
    assert [part[:1] for part in parts] == [("content",), (0,)] and parser.has_ended


def test_reasoning_that_the_prompt_began() -> None:
    """An answer to a prompt that opens the reasoning begins within it; one that never closes it is all reasoning."""
    inside = asked("hermes", reasoning=THINK, is_reasoning=True)
    assert parsed(inside, ["\nWhy ", "not?\n</thi", "nk>\n\nYes.\n"]) == ("Why not?", "Yes.\n", [])
    assert parsed(inside, ["no end </think"]) == ("no end </think", "", [])
    assert parsed(asked("hermes", reasoning=THINK), [" \n<think", "> a </think>"]) == ("a", "", [])
    assert parsed(asked("hermes", reasoning=THINK), [" \n<thin", "g>"]) == ("", " \n<thing>", [])


def test_white_space_of_plain_content_stays() -> None:
    """Content without calls keeps its white space, at both ends."""
    assert parsed(asked("hermes"), [" \n", "a", " \n ", "b \n"]) == ("", " \na \n b \n", [])
    assert [*AnswerParser(AnswerFormat()).push(" a ")] == [AnswerText("content", " a")]


def test_openings_that_lead_nowhere_cost_little() -> None:
    """Behind many openings that are no calls the rest is content unread: an answer cannot make its parsing slow."""
    text = '<tool_call>{"' * 2_000
    assert parsed(asked("hermes"), [text]) == ("", text, [])
    call = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    assert parsed(asked("hermes"), ["<tool_call>x" * MAX_MISSES + call])[2] == []
    assert parsed(asked("hermes"), ["<tool_call>x" * (MAX_MISSES - 1) + call])[2] == [("now", {})]
