"""Readers of calls, one for each syntax of a tool format.

Each begins at the place of a possible call and reads the calls that stand together there. JSON arguments are passed on
as the model wrote them; `NoCallError` says that the text is no call of the given functions.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from adapters_store.tools.formats import ARGS, ToolFormat
from adapters_store.tools.schemas import is_of_kind, kinds_of, listed_in, resolved, with_definitions
from adapters_store.tools.source import NoCallError, Reading, TextSource, parts_of

CALL_ID = "[CALL_ID]"
PYTHON_TAG = "<|python_tag|>"  # that Llama 3 may write before calls
CONSTANTS = {"True": True, "False": False, "None": None}
ARGUMENTS = ("arguments", "parameters")
Functions = Mapping[str, Mapping[str, Any]]  # schemas of their arguments, by name


class CallText(NamedTuple):
    """A call as it was read; `arguments` is the text of a JSON object."""

    name: str
    arguments: str


Reader = Callable[[TextSource, ToolFormat, Functions], Reading[list[CallText]]]


def _json(source: TextSource, form: ToolFormat, functions: Functions) -> Reading[list[CallText]]:
    """Read an object, or a list of objects, between the format's texts."""
    yield from source.take(PYTHON_TAG)
    yield from _expect_mark(source, form)
    calls = _calls((yield from source.brackets("{[", '"')), functions)
    yield from _end(source, form)
    return calls


def _mistral(source: TextSource, form: ToolFormat, functions: Functions) -> Reading[list[CallText]]:
    """Read a list of objects, or a name with its arguments behind it."""
    yield from _expect_mark(source, form)
    if (yield from source.peek()) in ("{", "["):
        return _calls((yield from source.brackets("{[", '"')), functions)
    name = yield from source.word()
    if (yield from source.take(CALL_ID)):
        yield from source.word()
    yield from source.take(ARGS)
    yield from source.skip()
    return [_call(name, (yield from source.brackets("{", '"')), functions)]


def _xml(source: TextSource, form: ToolFormat, functions: Functions) -> Reading[list[CallText]]:
    """Read `<function=NAME>` with its parameters, whose values are text that the function's schema gives a type."""
    is_marked = yield from source.take(form.texts.call_begin.strip())
    yield from source.skip()
    yield from source.expect("<function=")
    name, arguments = (yield from source.until(">")).strip(), dict[str, Any]()
    yield from source.skip()
    while (yield from source.take("<parameter=")):
        key = (yield from source.until(">")).strip()
        text = (yield from source.until("</parameter>")).removeprefix("\n").removesuffix("\n")
        _put(arguments, key, _typed(text, _schema_of(functions.get(name, {}), key)))
        yield from source.skip()
    yield from source.expect("</function>")
    if is_marked:
        yield from _end(source, form)
    return [_call(name, to_text(arguments), functions)]


def _pythonic(source: TextSource, _form: ToolFormat, functions: Functions) -> Reading[list[CallText]]:
    """Read a list of calls with keyword arguments, whose values are Python's or JSON's."""
    text = yield from source.brackets("[", "\"'")
    return _some([_python_call(one.strip(), functions) for one in parts_of(text[1:-1], "\"'")])


READERS: Mapping[str, Reader] = {
    "json": _json,
    "list": _mistral,
    "named": _mistral,
    "xml": _xml,
    "pythonic": _pythonic,
}


def openings(form: ToolFormat) -> tuple[str, ...]:
    """List the texts that calls begin with in the midst of an answer; none if calls have no mark."""
    if form.is_bare:
        return ()
    return (form.texts.call_begin.strip(), *(["<function="] if form.syntax == "xml" else []))


def to_value(text: str) -> Any:
    """Parse JSON. Raises `NoCallError`."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise NoCallError from None


def to_text(value: Any) -> str:
    """Write JSON, half characters as escapes. Raises `NoCallError` for what JSON does not have."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return text if text.isascii() or text.encode(errors="ignore").decode() == text else json.dumps(value)
    except (ValueError, TypeError, RecursionError):
        raise NoCallError from None


def _refuse(_constant: str) -> NoReturn:
    raise NoCallError


def _call(name: Any, arguments: str, functions: Functions) -> CallText:
    """Make a call of one of the functions; its arguments may be JSON text within JSON. Raises `NoCallError`."""
    value = to_value(arguments)
    if isinstance(value, str):
        arguments, value = value, to_value(value)
    if not isinstance(name, str) or name not in functions or not isinstance(value, dict):
        raise NoCallError
    return CallText(name, arguments)


def _calls(text: str, functions: Functions) -> list[CallText]:
    """Make calls of one JSON object or a list of them. Raises `NoCallError` if one of them is no call."""
    to_value(text)
    objects = parts_of(text[1:-1], '"') if text[0] == "[" else [text]
    return _some([_call_of_object(one.strip(), functions) for one in objects])


def _some(calls: list[CallText]) -> list[CallText]:
    if not calls:
        raise NoCallError
    return calls


def _call_of_object(text: str, functions: Functions) -> CallText:
    """Make a call of an object with a name and arguments, which may lie in its `function`."""
    if text[0] != "{":
        raise NoCallError
    members = dict(map(_member, parts_of(text[1:-1], '"')))
    if members.get("function", "").startswith("{"):
        return _call_of_object(members["function"], functions)
    name = members.get("name") or members.get("function") or "null"
    return _call(to_value(name), next((members[key] for key in ARGUMENTS if key in members), "{}"), functions)


def _member(text: str) -> tuple[str, str]:
    """Cut a member of a JSON object into its key and the text of its value."""
    text = text.strip()
    key, end = json.JSONDecoder().raw_decode(text)
    return key, text[end:].lstrip()[1:].strip()


def _expect_mark(source: TextSource, form: ToolFormat) -> Reading[None]:
    yield from source.expect(form.texts.call_begin.strip())
    yield from source.skip()


def _end(source: TextSource, form: ToolFormat) -> Reading[None]:
    """Read the text behind a call. The end of the answer may cut it short: the call is whole."""
    if not (mark := form.texts.call_end.strip()):
        return
    yield from source.skip()
    if not (yield from source.take(mark)):
        if not (source.is_over and mark.startswith(source.text[source.at :])):
            raise NoCallError
        source.at = len(source.text)


def _put(arguments: dict[str, Any], name: str, value: Any) -> None:
    if name in arguments:
        raise NoCallError
    arguments[name] = value


def _schema_of(schema: Mapping[str, Any], name: str) -> Any:
    """The schema of an argument, which has the definitions that it may refer to."""
    properties = schema.get("properties")
    return with_definitions(properties.get(name) if isinstance(properties, dict) else None, schema)


def _typed(text: str, schema: Any) -> Any:
    """Give the text of an argument the type that its schema names; text if none fits."""
    found = _value_of(text, schema)
    return text if found is None else found[0]


def _value_of(text: str, schema: Any) -> tuple[Any] | None:
    """Find the value that a text stands for by a schema; None if it stands for none.

    Null comes first, and then text if it may be text.
    """
    schema = resolved(schema)
    kinds = kinds_of(schema)
    if "null" in kinds and text in ("null", "None"):
        return (None,)
    if values := listed_in(schema):
        return next(((value,) for value in values if text == value or _json_of(text) == [json.dumps(value)]), None)
    if isinstance(options := schema.get("anyOf"), list):
        parts = [with_definitions(one, schema) for one in options]
        found = [(one, resolved(part)) for part in parts if (one := _value_of(text, part)) is not None]
        return next((one for one, part in found if is_of_kind(one[0], part)), found[0][0] if found else None)
    if not kinds or "string" in kinds:
        return (text,)
    values = [json.loads(written) for written in _json_of(text)]
    return (values[0],) if values else None


def _json_of(text: str) -> list[str]:
    """A text that is JSON, or one of Python's constants, as JSON is written here; nothing if it is neither."""
    try:
        return [json.dumps(CONSTANTS[text] if text in CONSTANTS else to_value(text))]
    except NoCallError:
        return []


def _python_call(text: str, functions: Functions) -> CallText:
    name, bracket, rest = text.partition("(")
    if not bracket or not rest.endswith(")"):
        raise NoCallError
    arguments = dict[str, Any]()
    for part in parts_of(rest[:-1], "\"'"):
        key, equals, value = part.partition("=")
        if not equals or not key.strip():
            raise NoCallError
        _put(arguments, key.strip(), _python_value(value.strip()))
    return _call(name.strip(), to_text(arguments), functions)


def _python_value(text: str) -> Any:
    """Parse a value of JSON, or else of Python. Raises `NoCallError`."""
    try:
        return to_value(text)
    except NoCallError:
        pass
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that Python does not know
            return ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise NoCallError from None
