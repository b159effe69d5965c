"""Grammars of calls let through what the parser reads, and nothing else."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLTokenizer

from adapters_store.form import compile_grammar
from adapters_store.format.manifest import ToolTexts
from adapters_store.tools.formats import ToolCall, ToolFormat
from adapters_store.tools.parser import AnswerFormat
from server.core import FormSpec
from server.engine.grammar import grammar_of
from server.errors import UnsupportedSchemaError
from server.requests.call_grammar import parts_form
from tests.adapters_store.tools.test_parser import ALL, THINK, parsed

COUNT: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 99}
UNIT: dict[str, Any] = {"type": "string", "enum": ["celsius", "<b>"]}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "get_weather": {
        "type": "object",
        "properties": {"days": COUNT, "unit": UNIT, "is_long": {"type": "boolean"}},
        "required": ["days"],
        "additionalProperties": False,
    },
    "set": {"type": "object", "properties": {"a": COUNT, "b": {"type": "null"}}, "additionalProperties": False},
    "now": {"type": "object", "properties": {}},
}
WANTED = [ToolCall("get_weather", {"days": 3, "unit": "celsius"}), ToolCall("now", {}), ToolCall("set", {"b": None})]


def asked(name: str, **fields: Any) -> AnswerFormat:
    return AnswerFormat(ALL[name], FUNCTIONS, **fields)


def matcher_of(answer_format: AnswerFormat, must_call: bool = True, content: FormSpec | None = None) -> Any:
    """The compiled grammar over single bytes, without tokens that are special."""
    grammar = grammar_of(parts_form(answer_format, content, must_call, lambda _text: None))
    return compile_grammar(LLTokenizer("byte"), grammar)


def fits(answer_format: AnswerFormat, text: str, must_call: bool = True, content: FormSpec | None = None) -> bool:
    """Whether a whole text fits the grammar of an answer."""
    matcher, tokens = matcher_of(answer_format, must_call, content), [*text.encode()]
    return bool(matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting())


def walked(matcher: Any, chance: random.Random) -> str:
    """A text that the grammar lets through, its bytes drawn."""
    written = bytearray()
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        bytes_left = [byte for byte in range(256) if mask[byte // 8] >> byte % 8 & 1]
        if matcher.is_accepting() and (not bytes_left or chance.random() < 0.5):
            break
        written.append(chance.choice(bytes_left))
        assert matcher.consume_tokens([written[-1]]) and len(written) < 5000
    return written.decode()


@pytest.mark.parametrize("name", ALL)
def test_whatever_must_call_is_read(name: str) -> None:
    """Every text that fits the grammar of an answer that must call is calls alone, whose arguments fit the schemas."""
    matcher, chance = matcher_of(asked(name)), random.Random(name)
    for _ in range(6):
        text = walked(matcher.deep_copy(), chance)
        _, content, calls = parsed(asked(name), [text])
        assert calls and not content, text
        for called, arguments in calls:
            schema = FUNCTIONS[called]
            assert set(schema.get("required", [])) <= set(arguments) <= set(schema["properties"]), text
            assert arguments.get("days", 0) in range(100) and arguments.get("unit", "<b>") in UNIT["enum"], text


@pytest.mark.parametrize("name", ALL)
def test_what_formats_write_fits(name: str) -> None:
    """Calls as the format writes them fit, one or several; several do not where one alone may be."""
    written = ALL[name].write_calls(WANTED)
    assert fits(asked(name), written)
    assert not fits(asked(name, is_parallel=False), written)
    assert fits(asked(name, is_parallel=False), ALL[name].write_calls(WANTED[:1]))
    assert not fits(asked(name), "Hello.")
    assert not fits(asked(name), ALL[name].write_calls([ToolCall("get_weather", {"days": 1000})]))


@pytest.mark.parametrize("name", ALL)
def test_calls_that_may_be(name: str) -> None:
    """An answer that may call is free text, and each call in it fits."""
    good, bad = (ALL[name].write_calls([ToolCall("get_weather", {"days": days})]) for days in (3, 1000))
    assert fits(asked(name), "Hello {1} [2] < you!", must_call=False)
    assert fits(asked(name), good, must_call=False)
    assert not fits(asked(name), bad, must_call=False)
    if not ALL[name].is_bare:
        assert fits(asked(name), f"I look. {good} Then: {good} Done <tool", must_call=False)
        assert not fits(asked(name), f"I look. {good} {bad}", must_call=False)


@pytest.mark.parametrize("name", ["hermes", "json"])
def test_reasoning_comes_first(name: str) -> None:
    """Calls may follow reasoning, and follow what the prompt began."""
    written = ALL[name].write_calls(WANTED)
    may, within = asked(name, reasoning=THINK), asked(name, reasoning=THINK, is_reasoning=True)
    assert fits(may, written) and fits(may, f"<think>{{hm}}</think>\n\n{written}")
    assert fits(within, f"hm</think>{written}") and not fits(within, written)


CONTENT = [
    (FormSpec("json_schema", {"type": "object", "properties": {"a": COUNT}, "required": ["a"]}, "f"), '{"a": 7}'),
    (FormSpec("regex", "[a-c]+", "f"), "abca"),
    (FormSpec("choice", ["yes", "n/o {"], "f"), "n/o {"),
    (FormSpec("grammar", 'start: call\ncall: "{" FREE? "}"\nFREE: /x+/', "f"), "{xx}"),  # names that ours has, too
]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("form", "text"), CONTENT)
def test_content_in_a_form(name: str, form: FormSpec, text: str) -> None:
    """Where content has a form, an answer is such content or calls that fit, behind reasoning or not."""
    good, bad = (ALL[name].write_calls([ToolCall("get_weather", {"days": days})]) for days in (3, 1000))
    may = asked(name, reasoning=THINK)
    for before in ("", "<think>hm</think>\n"):
        assert fits(may, before + text, must_call=False, content=form)
        assert fits(may, before + good, must_call=False, content=form)
    for wrong in (bad, "Hello.", text + good, f"<think>{text}"):
        assert not fits(may, wrong, must_call=False, content=form)
    without = AnswerFormat(reasoning=THINK, is_reasoning=True)
    assert fits(without, f"hm</think>{text}", must_call=False, content=form)
    assert not fits(without, text, must_call=False, content=form)


def test_the_lead_stands_before_all() -> None:
    """Answers that must call, or have a form, may begin with the lead that the adapter was trained with."""
    for must_call, content, text in ((True, None, ALL["hermes"].write_calls(WANTED)), (False, *CONTENT[0])):
        grammar = grammar_of(parts_form(asked("hermes", reasoning=THINK), content, must_call, lambda _text: None, " "))
        for before in (" ", "", " <think>a</think> "):
            tokens = [*(before + text).encode()]
            matcher = compile_grammar(LLTokenizer("byte"), grammar)
            assert matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


around = st.text(st.sampled_from("CALL[]{}<>|/\\\"'\n ()é🎩%$:;"), max_size=8)


@settings(max_examples=60, deadline=None)
@given(begin=around, end=around, must_call=st.booleans())
def test_any_texts_of_a_manifest(begin: str, end: str, must_call: bool) -> None:
    """Whatever texts an artifact has around its calls, calls as it writes them fit, and are read."""
    form = ToolFormat("json", ToolTexts(call_begin=begin, call_end=end))
    written = form.write_calls(WANTED[:1])
    answer_format = AnswerFormat(form, FUNCTIONS)
    assert fits(answer_format, written, must_call)
    assert parsed(answer_format, [*written])[2] == [(WANTED[0].name, WANTED[0].arguments)]
    for text in ("Hello!", "a {1} (2) [3]"):
        assert fits(answer_format, text, must_call=False) or form.texts.call_begin.strip() in text


def test_references_of_a_schema() -> None:
    """A schema that refers to itself means itself in a call; where an argument stands alone it cannot be held."""
    tree: dict[str, Any] = {
        "type": "object",
        "properties": {"n": COUNT, "next": {"$ref": "#"}, "unit": {"$ref": "#/$defs/unit"}},
        "additionalProperties": False,
        "$defs": {"unit": UNIT},
    }
    good: dict[str, Any]
    bad: dict[str, Any]
    for name, form in ALL.items():
        answer_format = AnswerFormat(form, {"f": tree})
        if form.syntax in ("xml", "pythonic"):
            with pytest.raises(UnsupportedSchemaError, match="refers to others"):
                parts_form(answer_format, None, True, lambda _text: None)
            answer_format = AnswerFormat(form, {"f": {**tree, "properties": {"unit": tree["properties"]["unit"]}}})
            good, bad = {"unit": "<b>"}, {"unit": "kelvin"}
        else:
            good, bad = {"n": 1, "next": {"n": 2, "unit": "<b>"}}, {"n": 1, "next": {"name": "f"}}
        assert fits(answer_format, form.write_calls([ToolCall("f", good)])), name
        assert not fits(answer_format, form.write_calls([ToolCall("f", bad)])), name


OPTIONAL: dict[str, Any] = {  # as Pydantic writes what may be null, and an enumeration
    "type": "object",
    "properties": {
        "a": {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None},
        "b": {"anyOf": [{"$ref": "#/$defs/unit"}, COUNT]},
    },
    "$defs": {"unit": {"$ref": "#/$defs/other"}, "other": UNIT},
}


@pytest.mark.parametrize("name", ALL)
def test_arguments_as_pydantic_writes_them(name: str) -> None:
    """Arguments that may be null, and enumerations by reference, are held to in every format."""
    answer_format = AnswerFormat(ALL[name], {"f": OPTIONAL})
    for good in ({"a": "text"}, {"a": None}, {"b": "<b>"}, {"b": 7}, {"a": "x", "b": 7}, {}):
        written = ALL[name].write_calls([ToolCall("f", good)])
        assert fits(answer_format, written), good
        assert parsed(answer_format, [written])[2] == [("f", good)]
    for bad in ({"b": "kelvin"}, {"b": 700}):
        assert not fits(answer_format, ALL[name].write_calls([ToolCall("f", bad)])), bad


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["string", "a", "#/$defs/a", "#", ""]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                ["type", "anyOf", "enum", "const", "$ref", "properties", "required", "items", "$defs", "a", "oneOf"]
            ),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from([*ALL]), properties=st.dictionaries(st.sampled_from("ab"), JUNK), definitions=JUNK)
def test_what_is_no_schema(name: str, properties: dict[str, Any], definitions: Any) -> None:
    """Whatever stands for a schema is refused in a sentence, or served."""
    schema = {"type": "object", "properties": properties, "$defs": definitions}
    with contextlib.suppress(UnsupportedSchemaError):
        grammar_of(FormSpec("json_schema", schema, "tools"))  # as the door does before
        grammar_of(parts_form(AnswerFormat(ALL[name], {"f": schema}), None, True, lambda _text: None))


def test_special_tokens() -> None:
    """A mark that is a special token of the base is that token in the grammar."""
    answer_format = asked("mistral_v11")
    form = parts_form(answer_format, None, True, {"[TOOL_CALLS]": 9000, "[ARGS]": 9001}.get)
    assert "whole: <[9000]> call" in form.value and '"now" <[9001]> %json' in form.value
    assert grammar_of(form)


@pytest.mark.parametrize("held", ["pattern", "oneOf"])
def test_text_that_cannot_be_held(held: str) -> None:
    """A keyword over text that the format writes as it is, is refused by name, and so is a name it cannot write."""
    schema = {"type": "object", "properties": {"a": {"type": "string", held: []}}}
    with pytest.raises(UnsupportedSchemaError, match=f"keyword {held} for a"):
        parts_form(AnswerFormat(ALL["qwen3_coder"], {"f": schema}), None, True, lambda _text: None)
    for properties, required in (({"a b": {}}, []), ({}, ["a"])):
        functions = {"f": {"properties": properties, "required": required}}
        with pytest.raises(UnsupportedSchemaError, match="argument 'a"):
            parts_form(AnswerFormat(ALL["pythonic"], functions), None, True, lambda _text: None)


def test_free_text_of_arguments() -> None:
    """Text as it is ends at its mark, whatever it says."""
    functions = {"f": {"properties": {"a": {"type": "string"}}, "required": ["a"]}}
    answer_format = AnswerFormat(ALL["qwen3_coder"], functions)
    text = 'x <b>\n</function> % \\ "é\n'
    written = ALL["qwen3_coder"].write_calls([ToolCall("f", {"a": text})])
    assert fits(answer_format, written) and parsed(answer_format, [written])[2] == [("f", {"a": text})]
