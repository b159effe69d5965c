"""Grammars of answers in parts, in llguidance's dialect of Lark: what they let through, the parser reads as such.

An answer may begin with reasoning, if the base reasons. Then come calls, if it must call; or calls or content in a
form, if content has one; or free text with calls in it, each of which fits.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from adapters_store.form import json_value, nested
from adapters_store.tools.formats import ARGS, ToolFormat, to_json
from adapters_store.tools.parser import AnswerFormat
from adapters_store.tools.readers import openings
from adapters_store.tools.schemas import DEFINITIONS, SHARED, kinds_of, listed_in, resolved, with_definitions
from server.core import FormSpec
from server.errors import UnsupportedSchemaError

MAX_CALLS = 16  # of an answer that must call
UNHELD = ("pattern", "format", "minLength", "maxLength", "oneOf", "allOf", "$ref")  # of text that is no JSON
PARAMETER = re.compile(r"[^\s=,<>()\[\]{}\"']+")
WORDS = {"boolean": ("True", "False"), "null": ("None",)}  # of Python, by the types that they are of
UNMARKED = r"/\s*(([^\s{\[<]|<[^|])(?s:.*))?/"  # text that no bare call begins
CLOSED: Mapping[str, Any] = {"additionalProperties": False}
VALUE = r"/(?s:.*)<\/parameter>/"


def parts_form(
    answer_format: AnswerFormat,
    content: FormSpec | None,
    must_call: bool,
    special_id: Callable[[str], int | None],
    lead: str = "",
) -> FormSpec:
    """The form of an answer in parts, which may stand behind `lead`. `content` is the form of what is no call.

    `special_id` gives the token of a special text. Raises `UnsupportedSchemaError` for arguments that the format cannot
    write so that they fit.
    """
    value = _Grammar(answer_format, special_id).write(content, must_call, lead)
    return FormSpec("parts", value, "tools" if content is None else content.field)


class _Grammar:
    """Writes the grammar of one request, rule by rule."""

    def __init__(self, answer_format: AnswerFormat, special_id: Callable[[str], int | None]) -> None:
        self._answer = answer_format
        self._special = {mark: token for mark in answer_format.marks if (token := special_id(mark)) is not None}
        self._rules: list[str] = []

    def write(self, content: FormSpec | None, must_call: bool, lead: str) -> str:
        if must_call:
            answer = self._called()
        elif content is not None:
            calls = [] if self._answer.tools is None else [self._called()]
            answer = f"({' | '.join([*calls, nested(content.kind, content.value)])})"
        elif self._form.is_bare:
            answer = f"({self._called()} | {self._rule('FREE', UNMARKED)})"
        else:
            answer = self._between_text()
        before = f"{_literal(lead)}?" if lead else ""
        return "\n".join([f"start: {before} {self._thought()} {answer}", *self._rules])

    @property
    def _form(self) -> ToolFormat:
        assert self._answer.tools is not None  # noqa: S101 - without tools nothing is called
        return self._answer.tools

    def _called(self) -> str:
        """An answer of calls alone."""
        texts = self._form.texts
        return self._calls(self._text(texts.call_begin), self._text(texts.call_end), MAX_CALLS)

    def _between_text(self) -> str:
        """Free text with calls anywhere in it: what begins a call is followed by one."""
        begin, end, marks = self._form.texts.call_begin, self._text(self._form.texts.call_end), openings(self._form)
        opening, rest = marks[-1], begin.partition(marks[-1])[2]
        if opening in self._special:
            self._rule("free", f"/(?s:.*)/ {self._text(opening)}")
        else:
            self._rules.append(f"free[lazy]: /(?s:.*){_pattern(opening)}/")
        self._rule("FREE", f"/(?s:.*)/ & ~/(?s:.*{_pattern(opening)}.*)/")
        is_xml = self._form.syntax == "xml"
        calls = self._calls(self._text("" if is_xml else rest), f"({end})?" if is_xml else end, 1, opening)
        return f"(free {calls})* FREE"

    def _thought(self) -> str:
        """The reasoning that an answer may begin with, or that its prompt began."""
        if self._answer.reasoning is None:
            return ""
        begin, end = self._answer.reasoning
        if end in self._special:
            self._rule("thought", f"/(?s:.*)/ {self._text(end)} /\\s*/")
        else:
            self._rules.append(f"thinking[lazy]: /(?s:.*){_pattern(end)}/")
            self._rule("thought", "thinking /\\s*/")
        return "thought" if self._answer.is_reasoning else f"({self._text(begin)} thought)?"

    def _calls(self, begin: str, end: str, max_calls: int, written: str = "") -> str:
        """Write one call or more of the functions, between two texts; `written` stands before each already."""
        functions = enumerate(self._answer.functions.items())
        names = [self._function(number, *one, written) for number, one in functions]
        self._rule("call", " | ".join(names))
        if self._form.syntax in ("list", "pythonic"):
            return f"{begin} {_literal('[')} call {self._more(', ', 'call', MAX_CALLS)} {_literal(']')} {end}"
        self._rule("whole", f"{begin} call {end}")
        return f"whole {self._more(self._form.between, 'whole', max_calls)}"

    def _more(self, between: str, rule: str, max_calls: int) -> str:
        if not self._answer.is_parallel or max_calls == 1:
            return ""
        return f"({_literal(between)} {rule}){{0,{max_calls - 1}}}"

    def _function(self, number: int, name: str, schema: Mapping[str, Any], written: str) -> str:
        """A rule of one call, without the texts around it."""
        rule = f"f{number}"
        match self._form.syntax:
            case "xml":
                head = f"<function={name}>\n".removeprefix(written)
                body = [_literal(head), *self._parameters(rule, name, schema), _literal("</function>")]
            case "pythonic":
                body = [_literal(f"{name}("), self._keywords(rule, name, schema), _literal(")")]
            case "named":
                body = [_literal(name), self._text(ARGS), json_value(_object(schema))]
            case _:
                # One value, in the lexemes of JSON: a long text of its own would hide what content may begin with.
                key = self._form.arguments
                members = {"name": {"const": name}, key: _moved(_object(schema), f"#/properties/{key}")}
                body = [json_value({"type": "object", "properties": members, "required": [*members], **CLOSED})]
        return self._rule(rule, " ".join(body))

    def _parameters(self, rule: str, name: str, schema: Mapping[str, Any]) -> Iterator[str]:
        """The parameters of a call in the syntax `xml`, in the order of the schema."""
        for number, (key, part, is_required) in enumerate(_properties(name, schema)):
            value = self._value(f"{rule}v{number}", name, key, part)
            one = f"{_literal(f'<parameter={key}>{chr(10)}')} {value} {_literal(chr(10))}"
            yield one if is_required else f"({one})?"

    def _value(self, rule: str, name: str, key: str, schema: Mapping[str, Any]) -> str:
        """A value in the syntax `xml`, with the mark behind it: text as it is if it may be text, else JSON."""
        schema = resolved(schema)
        if options := schema.get("anyOf"):
            parts = [with_definitions(one, schema) for one in options]
            values = [self._value(f"{rule}o{at}", name, key, one) for at, one in enumerate(parts)]
            return f"({' | '.join(values)})"
        kinds = kinds_of(schema)
        if not kinds or "string" in kinds:
            return self._raw(rule, name, key, schema)
        return f"{json_value(schema)} {_literal(chr(10) + '</parameter>')}"

    def _raw(self, rule: str, name: str, key: str, schema: Mapping[str, Any]) -> str:
        """Text as it is, with the mark behind it."""
        if held := next((word for word in UNHELD if word in schema), None):
            raise UnsupportedSchemaError(
                f"the function {name} has the keyword {held} for {key}, which is plain text in this base's format of "
                "calls, and cannot be held to it: leave the keyword out",
                "tools",
            )
        if values := listed_in(schema):
            texts = [value if isinstance(value, str) else to_json(value) for value in values]
            choice = " | ".join(_literal(text) or '""' for text in texts)
            return f"({choice}) {_literal(chr(10) + '</parameter>')}"
        self._rules.append(f"{rule}[lazy]: {VALUE}")
        return rule

    def _keywords(self, rule: str, name: str, schema: Mapping[str, Any]) -> str:
        """The arguments of a call in the syntax `pythonic`: those that are required, then any of the others."""
        found = [*_properties(name, schema)]
        written = [(f"{_literal(f'{key}=')} {_python(part)}", is_required) for key, part, is_required in found]
        needed = f" {_literal(', ')} ".join(one for one, is_required in written if is_required)
        others = [one for one, is_required in written if not is_required]
        if needed or not others:
            return " ".join([needed, *(f"({_literal(', ')} {one})?" for one in others)]) or '""'
        for at in reversed(range(len(others))):
            rest = f"{rule}a{at + 1}" if at + 1 < len(others) else ""
            self._rule(f"{rule}a{at}", f"({_literal(', ')} {others[at]})? {rest}")
        firsts = [f"{one} {f'{rule}a{at + 1}' if at + 1 < len(others) else ''}" for at, one in enumerate(others)]
        return f"({' | '.join(firsts)})?"

    def _rule(self, name: str, body: str) -> str:
        self._rules.append(f"{name}: {body}")
        return name

    def _text(self, text: str) -> str:
        """A text, of which special tokens are those tokens."""
        pattern = "|".join(map(re.escape, self._special)) or "(?!)"
        pieces = re.split(f"({pattern})", text)
        return " ".join(f"<[{self._special[one]}]>" if one in self._special else _literal(one) for one in pieces if one)


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if text else ""


def _pattern(text: str) -> str:
    """A text as a regular expression of Lark, in which no line may end."""
    return "".join(one if one.isalnum() else f"\\x{{{ord(one):x}}}" for one in text)


def _python(schema: Mapping[str, Any]) -> str:
    """A value that fits a schema: of JSON, but for Python's own words."""
    kinds = set() if "enum" in schema or "const" in schema else kinds_of(schema)
    words = [_literal(word) for kind, words in WORDS.items() if kind in kinds for word in words]
    return f"({' | '.join([*words, *([] if words and kinds <= WORDS.keys() else [json_value(schema)])])})"


def _object(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments; one that lists no properties takes none."""
    is_empty = schema.get("properties") == {} and "additionalProperties" not in schema
    return {"type": "object", **schema, **(CLOSED if is_empty else {})}


def _moved(schema: Any, place: str) -> Any:
    """A schema whose references to itself hold at another place of a document."""
    if isinstance(schema, list):
        return [_moved(part, place) for part in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(part, place) for key, part in schema.items()}
    if isinstance(target := schema.get("$ref"), str) and target.startswith("#"):
        moved["$ref"] = place + target[1:]
    return moved


def _refers_elsewhere(schema: Any) -> bool:
    """Whether a schema refers to more than the definitions that every argument has with it."""
    if isinstance(schema, list):
        return any(map(_refers_elsewhere, schema))
    if not isinstance(schema, dict):
        return False
    target = schema.get("$ref", "")
    is_elsewhere = isinstance(target, str) and target.startswith("#") and not target.startswith(SHARED)
    return is_elsewhere or any(map(_refers_elsewhere, schema.values()))


def _properties(name: str, schema: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Yield the arguments of a function: name, schema, and whether it is required. Raises `UnsupportedSchemaError`."""
    shared = {word: schema[word] for word in DEFINITIONS if word in schema}
    properties, required = schema.get("properties", {}), schema.get("required", [])
    for key in dict.fromkeys([*properties, *required]):
        part = properties.get(key, False)
        if not PARAMETER.fullmatch(key) or part is False or _refers_elsewhere([part, shared]):
            raise UnsupportedSchemaError(
                f"the function {name} cannot be called in this base's format: its argument {key[:64]!r} has no schema, "
                f"one that refers to others than {' and '.join(SHARED)}, or a name that the format cannot write",
                "tools",
            )
        yield key, with_definitions(part, schema), key in required
