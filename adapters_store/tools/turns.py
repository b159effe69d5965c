"""Turns of a conversation with tools: as a chat template takes them, and as plain turns in a tool format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from adapters_store.format.manifest import Turn
from adapters_store.tools.formats import ToolCall, ToolFormat

Put = Callable[[str, str], str]  # (who wrote it, text) -> the text to write
Tools = Sequence[Mapping[str, Any]]  # functions: name, description, parameters as a JSON schema
TOOL, USER, SYSTEM = "tool", "user", "system"
NO_ARGUMENTS: Mapping[str, Any] = {"type": "object", "properties": {}}  # of a function that names none
WORDS = re.compile(  # of the form of a function, which templates look for
    "additionalProperties|array|boolean|default|description|enum|function|integer|items|name|null|number|object"
    "|parameters|properties|required|strict|string|title|type"
)


class ToolTurn(NamedTuple):
    """A turn that may call tools, or that has the result of the call `call_id` of the function `name`."""

    role: str
    content: str
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""
    name: str = ""
    reasoning: str = ""

    @property
    def needs_tools(self) -> bool:
        """Tell whether only a template or a format with tools can write the turn."""
        return bool(self.calls) or self.role == TOOL


AnyTurn = Turn | ToolTurn


def messages_of(turns: Sequence[ToolTurn], put: Put) -> list[dict[str, Any]]:
    """Give turns as chat templates take them; `put` replaces every text that somebody wrote, in order."""
    return [_message(turn, lambda text, role=turn.role: put(role, text)) for turn in turns]  # type: ignore[misc]


def functions_of(tools: Tools, put: Put) -> list[dict[str, Any]] | None:
    """Give tools as chat templates take them, None if there are none; `put` as of `messages_of`."""

    def write(text: str) -> str:
        return text if WORDS.fullmatch(text) else put(TOOL, text)

    return [{"type": "function", "function": _mapped(tool, write)} for tool in tools] or None


def plain_turns(turns: Sequence[ToolTurn], tools: Tools, form: ToolFormat) -> list[Turn]:
    """Write turns with tools as plain ones, in a tool format.

    The tools stand at the end of the system turn that begins, results in users' turns. Reasoning of earlier turns is
    left out.
    """
    plain = list[Turn]()
    for turn in turns:
        if turn.role != TOOL:
            content = "\n".join(filter(None, (turn.content, form.write_calls(turn.calls) if turn.calls else "")))
            plain.append((turn.role, content))
            continue
        result = form.write_result(turn.content)
        if plain and plain[-1][0] == USER:
            result = f"{plain.pop()[1]}\n{result}"
        plain.append((USER, result))
    if not tools:
        return plain
    written = form.write_tools(tools)
    if plain and plain[0][0] == SYSTEM:
        written = f"{plain.pop(0)[1]}\n\n{written}"
    return [(SYSTEM, written), *plain]


def _message(turn: ToolTurn, put: Callable[[str], str]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": turn.role, "content": put(turn.content)}
    if turn.reasoning:
        message["reasoning_content"] = put(turn.reasoning)
    if turn.calls:
        message["tool_calls"] = [_call(call, put) for call in turn.calls]
    if turn.role == TOOL:
        message |= {"tool_call_id": put(turn.call_id), "name": put(turn.name)}
    return message


def _call(call: ToolCall, put: Callable[[str], str]) -> dict[str, Any]:
    function = {"name": put(call.name), "arguments": _mapped(call.arguments, put)}
    return {"id": put(call.id), "type": "function", "function": function}


def _mapped(value: Any, write: Callable[[str], str]) -> Any:
    """Replace every text in a JSON value, names of members too."""
    if isinstance(value, str):
        return write(value)
    if isinstance(value, Mapping):
        return {write(name): _mapped(member, write) for name, member in value.items()}
    return [_mapped(member, write) for member in value] if isinstance(value, list) else value
