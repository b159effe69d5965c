"""Rows of turns: read as TRL has them, with tools and their calls, and checked against what a server reads back.

A row has `messages`, or `prompt` and `completion` as lists of turns, and may have `tools`, a list of functions as
OpenAI's API and chat templates take them. The last turn is the assistant's: text, calls of tools, or both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from adapters_store.base.turns import ASSISTANT, AnswerRefusedError, Rendered, ToolsRefusedError, TurnEncoder
from adapters_store.format.manifest import ToolFormatName, ToolTexts
from adapters_store.format.strict_json import StrictJSONError, loads
from adapters_store.tools.formats import FORMATS, ToolCall, ToolFormat, format_in, format_of, reasoning_in
from adapters_store.tools.parser import AnswerFormat, AnswerParser, CallPart, said_in
from adapters_store.tools.turns import NO_ARGUMENTS, TOOL, Tools, ToolTurn
from training.errors import DataError, OptionError

TOOLS = "tools"  # the column
WEIGHT = "weight"  # of a turn, as OpenAI's fine-tuning has it: 0 is not learned, 1 is
READ = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", WEIGHT)  # of a turn
OLD = {"functions": TOOLS, "function_call": "tool_calls"}  # names of OpenAI's that were followed by others


@dataclass(frozen=True)
class Chat:
    """The turns of a row, the last of which is learned, and the functions that it may call."""

    turns: tuple[ToolTurn, ...]
    tools: Tools = ()

    @property
    def answer(self) -> ToolTurn:
        """The turn that is learned."""
        return self.turns[-1]

    @property
    def needs_tools(self) -> bool:
        """Tell whether a turn or the row has what only a template or a format with tools can write."""
        return bool(self.tools or self.answer.reasoning) or any(turn.needs_tools for turn in self.turns)


def read_chat(where: str, row: Mapping[str, Any], messages: Any) -> Chat:
    """Read the turns and the tools of a row. Raises `DataError`, naming the row and the field."""
    if not isinstance(messages, list) or len(messages) < 2:
        raise DataError(f"{where}: turns must be a list of at least two {{'role': …, 'content': text}}.")
    turns, names = list[ToolTurn](), dict[str, str]()
    for number, message in enumerate(messages, start=1):
        turns.append(turn := _turn(f"{where}, turn {number}", message, names))
        names |= {call.id: call.name for call in turn.calls}
    answer = turns[-1]
    if answer.role != ASSISTANT or not (answer.content.strip() or answer.calls):
        raise DataError(f"{where}: the last turn must be the assistant's and not empty; it is what is learned.")
    _check_weights(where, messages)
    _refuse_unread(where, {name: row[name] for name in OLD if name in row})
    chat = Chat(tuple(turns), _tools(where, row.get(TOOLS)))
    known = {tool["name"] for tool in chat.tools}
    if unknown := next((call.name for call in answer.calls if call.name not in known), None):
        raise DataError(f"{where}: the answer calls {unknown!r}, which {TOOLS!r} does not list.")
    return chat


def tool_format_named(option: str) -> ToolFormatName | ToolTexts | None:
    """Return the format that `--tool-format` names, or whose texts its file has; empty: none. Raises `OptionError`."""
    if not option:
        return None
    if name := next((name for name in FORMATS if name == option), None):
        return name
    try:
        return msgspec.convert(loads(Path(option).read_bytes()), ToolTexts)
    except OSError as error:
        reason = f"is none of {', '.join(FORMATS)}, nor a file to read: {error.strerror}"
    except (StrictJSONError, msgspec.ValidationError) as error:
        reason = f"does not hold the texts of a format ({', '.join(ToolTexts.__struct_fields__)}): {error}"
    raise OptionError(f"--tool-format {option} {reason}.")


def render_chat(
    where: str, encoder: TurnEncoder, chat: Chat, named: ToolFormatName | ToolTexts | None
) -> tuple[Rendered, Rendered]:
    """Write a row's prompt and its answer as a server does. Raises `DataError` for what it would not read back."""
    turns, answer, form = chat.turns[:-1], chat.answer, None if named is None else format_of(named)
    try:
        prompt = encoder.render(turns, None, chat.tools, form)
        written = encoder.render_answer(turns, answer, chat.tools, form)
    except (AnswerRefusedError, ToolsRefusedError) as error:
        raise DataError(f"{where}: {error}; name a format of calls with --tool-format.") from error
    except Exception as error:
        raise DataError(f"{where}: the base's chat template refuses these turns: {error}.") from error
    _check_read_back(where, chat, "".join(prompt.pieces), "".join(written.pieces), encoder.template, form)
    return prompt, written


def _check_read_back(where: str, chat: Chat, prompt: str, written: str, template: str, form: ToolFormat | None) -> None:
    """Refuse an answer that a server would tell its users otherwise than the row has it."""
    written_in = form or FORMATS[format_in(template)]
    parser = AnswerParser(AnswerFormat.of(written_in, chat.tools, reasoning_in(template), prompt))
    parts = [*parser.push(written), *parser.finish()]
    calls = [(part.name, json.loads(part.arguments)) for part in parts if isinstance(part, CallPart)]
    answer = chat.answer
    for field, found, wanted in (
        ("tool_calls", calls, [(call.name, call.arguments) for call in answer.calls]),
        ("content", said_in(parts, "content").strip(), answer.content.strip()),
        ("reasoning_content", said_in(parts, "reasoning").strip(), answer.reasoning.strip()),
    ):
        if found != wanted:
            raise DataError(
                f"{where}: a server would read another {field!r} out of the answer, which is written as "
                f"{written[:200]!r}: {str(found)[:100]} instead of {str(wanted)[:100]}. Change the row, or name a "
                "format of calls with --tool-format."
            )


def _turn(where: str, message: Any, names: Mapping[str, str]) -> ToolTurn:
    """Read a turn; `names` are those of the functions that were called before, by the id of the call."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise DataError(f"{where} must be {{'role': …, 'content': text}}.")
    _refuse_unread(where, {name: value for name, value in message.items() if name not in READ})
    role, calls = message["role"], message.get("tool_calls") or []
    content: Any = message.get("content") if message.get("content") is not None or not calls else ""
    reasoning = message.get("reasoning_content") or ""
    for name, text in (("content", content), ("reasoning_content", reasoning)):
        check_text(where, name, text)
    if (calls or reasoning) and role != ASSISTANT:
        field = "tool_calls" if calls else "reasoning_content"
        raise DataError(f"{where}: {field!r} belongs to a turn of the role {ASSISTANT!r}, not {role!r}.")
    if not isinstance(calls, list):
        raise DataError(f"{where}: 'tool_calls' must be a list.")
    call_id = str(message.get("tool_call_id") or "")
    name = str(message.get("name") or names.get(call_id, "")) if role == TOOL else ""
    return ToolTurn(role, content, tuple(_call(where, call) for call in calls), call_id, name, reasoning)


def _refuse_unread(where: str, unread: Mapping[str, Any]) -> None:
    """Raise `DataError` if one of the fields that nothing here reads asks for something."""
    if name := next((name for name, value in unread.items() if value not in (None, "", [], {})), None):
        known = f"write {OLD[name]!r}" if name in OLD else f"take it out (a turn has {', '.join(READ)})"
        raise DataError(f"{where}: {name!r} is not understood: {known}.")


def _check_weights(where: str, messages: list[dict[str, Any]]) -> None:
    """Refuse turns whose weights ask for other turns to be learned than the last."""
    for number, message in enumerate(messages, start=1):
        turn, weight, is_last = f"{where}, turn {number}", message.get(WEIGHT), number == len(messages)
        if weight is None:
            continue
        if message["role"] != ASSISTANT or isinstance(weight, bool) or weight not in (0, 1):
            raise DataError(f"{turn}: {WEIGHT!r} must be 0 or 1, of a turn of the role {ASSISTANT!r}.")
        if is_last and not weight:
            raise DataError(f"{turn} has the {WEIGHT} 0, and is the one that is learned: remove the row, or cut it.")
        if weight and not is_last:
            raise DataError(
                f"{turn} has the {WEIGHT} 1, and only the last turn is learned: give it 0, or write a row that ends "
                "with it."
            )


def _call(where: str, call: Any) -> ToolCall:
    """Read a call: its name and arguments, an object or the text of one, which may lie in its `function`."""
    function = _function(call)
    name, arguments = function.get("name"), _parsed(where, "arguments", function.get("arguments", {}))
    if not isinstance(name, str) or not isinstance(arguments, dict):
        shown = json.dumps(call)[:80]
        raise DataError(f"{where}: a call must have a 'name' and an object of 'arguments', not {shown}.")
    check_text(where, "tool_calls", json.dumps(call, ensure_ascii=False))
    return ToolCall(name, arguments, str(call.get("id") or ""))


def _tools(where: str, given: Any) -> Tools:
    """Read the functions of a row, which may be the text of a list, as data sets have it."""
    given = [] if given is None else _parsed(where, TOOLS, given)
    tools = [_function(tool) for tool in given] if isinstance(given, list) else [{}]
    if not all(isinstance(tool.get("name"), str) for tool in tools):
        raise DataError(f"{where}: {TOOLS!r} must be a list of functions, each with a 'name'.")
    check_text(where, TOOLS, json.dumps(tools, ensure_ascii=False))
    return [{**tool, "parameters": tool.get("parameters") or NO_ARGUMENTS} for tool in tools]


def _function(value: Any) -> dict[str, Any]:
    """Return the object of a function, or the one that lies in its `function`; empty if there is none."""
    found = value.get("function", value) if isinstance(value, dict) else {}
    return found if isinstance(found, dict) else {}


def _parsed(where: str, name: str, value: Any) -> Any:
    """Parse a value that is the text of JSON; one that is no text is as it is."""
    try:
        return loads(value) if isinstance(value, str) else value
    except StrictJSONError as error:
        raise DataError(f"{where}: {name!r} is not JSON: {error}.") from error


def check_text(where: str, name: str, value: Any) -> None:
    """Raise `DataError` for a value that is no text, or half of a character."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {name!r} must be text, not {json.dumps(value)[:40]}.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise DataError(f"{where}: {name!r} holds half of a character (a lone surrogate), which is no text.")
