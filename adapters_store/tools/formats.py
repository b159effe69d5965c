"""The table of tool formats: how calls of functions are written in an answer.

A format is of one syntax, with plain text around its parts:

* `json`: `{"name": …, "arguments": {…}}` between two texts, or bare if `call_begin` is blank;
* `list`: one JSON list of such objects behind a text;
* `named`: a text, the name, a second text, and the arguments as JSON;
* `xml`: `<function=NAME>` with a `<parameter=NAME>` for each argument, whose text is as it is;
* `pythonic`: a Python list of calls with keyword arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from adapters_store.format.manifest import ToolFormatName, ToolTexts

Syntax = Literal["json", "list", "named", "xml", "pythonic"]
ARGS = "[ARGS]"  # between a name and its arguments, in the syntax `named`
ASKED = "You may call these functions. To call one, answer with {how}. Functions:\n"


class ToolCall(NamedTuple):
    """A call of a function, with its arguments as a JSON object."""

    name: str
    arguments: dict[str, Any]
    id: str = ""


@dataclass(frozen=True)
class ToolFormat:
    """A syntax and the texts around its parts; `arguments` is the key of the arguments in JSON.

    Calls of one answer are joined by `between`. With `has_short_ids` the ids of calls have 9 letters and digits.
    """

    syntax: Syntax
    texts: ToolTexts
    arguments: str = "arguments"
    between: str = "\n"
    has_short_ids: bool = False

    @property
    def is_bare(self) -> bool:
        """Tell whether calls have no mark of their own: an answer that calls begins with a call."""
        return self.syntax == "pythonic" or (self.syntax == "json" and not self.texts.call_begin.strip())

    def write_tools(self, tools: Sequence[Mapping[str, Any]]) -> str:
        """Write functions for the model to read, one JSON object a line."""
        return self.texts.before_tools + "\n".join(to_json(tool) for tool in tools)

    def write_result(self, text: str) -> str:
        """Write the result of a call."""
        return self.texts.result_begin + text + self.texts.result_end

    def write_calls(self, calls: Sequence[ToolCall]) -> str:
        """Write calls as an answer has them."""
        begin, end = self.texts.call_begin, self.texts.call_end
        if self.syntax == "list":
            return begin + to_json([self._object(call) for call in calls]) + end
        if self.syntax == "pythonic":
            return begin + f"[{', '.join(map(_python, calls))}]" + end
        return self.between.join(begin + self._write(call) + end for call in calls)

    def _write(self, call: ToolCall) -> str:
        if self.syntax == "named":
            return call.name + ARGS + to_json(call.arguments)
        return _xml(call) if self.syntax == "xml" else to_json(self._object(call))

    def _object(self, call: ToolCall) -> dict[str, Any]:
        return {"name": call.name, self.arguments: call.arguments}


def to_json(value: Any) -> str:
    """Write JSON as chat templates do."""
    return json.dumps(value, ensure_ascii=False)


def _python(call: ToolCall) -> str:
    values = {name: to_json(value) if isinstance(value, str) else repr(value) for name, value in call.arguments.items()}
    return f"{call.name}({', '.join(f'{name}={value}' for name, value in values.items())})"


def _xml(call: ToolCall) -> str:
    texts = {name: value if isinstance(value, str) else to_json(value) for name, value in call.arguments.items()}
    lines = [f"<parameter={name}>\n{text}\n</parameter>\n" for name, text in texts.items()]
    return f"<function={call.name}>\n{''.join(lines)}</function>"


def _asked(how: str, begin: str = "", end: str = "", result: tuple[str, str] = ("", "")) -> ToolTexts:
    return ToolTexts(ASKED.format(how=how), begin, end, *result)


_RESPONSE = ("<tool_response>\n", "\n</tool_response>")
_OBJECT = '{"name": NAME, "arguments": {…}}'
_FUNCTION = "<function=NAME>\n<parameter=NAME>\nVALUE\n</parameter>\n</function>"

FORMATS: Mapping[ToolFormatName, ToolFormat] = {
    "hermes": ToolFormat(
        "json",
        _asked(f"<tool_call>\n{_OBJECT}\n</tool_call>", "<tool_call>\n", "\n</tool_call>", _RESPONSE),
    ),
    "qwen3_coder": ToolFormat(
        "xml", _asked(f"<tool_call>\n{_FUNCTION}\n</tool_call>", "<tool_call>\n", "\n</tool_call>", _RESPONSE)
    ),
    "llama3": ToolFormat(
        "json", _asked('{"name": NAME, "parameters": {…}} alone'), arguments="parameters", between="; "
    ),
    "mistral": ToolFormat(
        "list",
        _asked(f"[TOOL_CALLS] [{_OBJECT}]", "[TOOL_CALLS] ", result=("[TOOL_RESULTS] ", "[/TOOL_RESULTS]")),
        has_short_ids=True,
    ),
    "mistral_v11": ToolFormat(
        "named",
        _asked("[TOOL_CALLS]NAME[ARGS]{…}", "[TOOL_CALLS]", result=("[TOOL_RESULTS]", "[/TOOL_RESULTS]")),
        between="",
        has_short_ids=True,
    ),
    "pythonic": ToolFormat("pythonic", _asked("[NAME(ARGUMENT=VALUE, …)] alone")),
    "json": ToolFormat("json", _asked(f"{_OBJECT} alone")),
}
MARKERS: Sequence[
    tuple[tuple[str, ...], ToolFormatName]
] = (  # texts of a chat template that show its format, the surest first
    (("[TOOL_CALLS]", ARGS), "mistral_v11"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<tool_call>",), "hermes"),
    (("<|python_start|>",), "pythonic"),
    (("[func_name1(",), "pythonic"),
    (("<|python_tag|>",), "llama3"),
    (('"parameters": dictionary',), "llama3"),
)
REASONING = (("<think>", "</think>"), ("[THINK]", "[/THINK]"))


def format_of(tools: ToolFormatName | ToolTexts) -> ToolFormat:
    """Return a format of the table, or the one of a manifest's texts."""
    return FORMATS[tools] if isinstance(tools, str) else ToolFormat("json", tools)


def format_in(template: str) -> ToolFormatName:
    """Name the format that a chat template with tools writes; one without a known mark has calls in plain JSON."""
    return next((name for marks, name in MARKERS if all(mark in template for mark in marks)), "json")


def reasoning_in(template: str) -> tuple[str, str] | None:
    """Return the texts around reasoning that a chat template names, or None."""
    return next((pair for pair in REASONING if all(text in template for text in pair)), None)
