"""The input of OpenAI's responses: items that are messages, reasoning, calls and results, and the turns they make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from adapters_store.tools.turns import TOOL, ToolTurn
from server.api import openai_fields
from server.api.openai_fields import Tolerant
from server.api.tool_fields import (
    MAX_TOOLS,
    CalledFunction,
    CalledName,
    CallId,
    FunctionDefinition,
    FunctionFields,
    ToolChoice,
    called_name,
    read_call,
)

ASSISTANT = "assistant"
ITEMS = ("message", "function_call", "function_call_output", "reasoning")


class FunctionTool(FunctionDefinition):
    """A function that may be called."""

    neutral = openai_fields.FUNCTION_TOOL
    type: Literal["function"]

    def echoed(self) -> dict[str, Any]:
        """The tool as the response tells it again."""
        told = {"type": "function", "name": self.name, "description": self.description}
        return told | {"parameters": self.parameters, "strict": bool(self.strict)}


class NamedFunction(CalledName):
    """A function that must be called."""

    type: Literal["function"]


class FunctionToolFields(FunctionFields):
    """The tools of a request, each of which is a function, and whether the answer is to call them."""

    parameters_field = "parameters"
    tools: Annotated[list[FunctionTool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice | NamedFunction = "auto"

    def functions(self) -> Sequence[FunctionDefinition]:
        """The tools, each of which is a function."""
        return self.tools

    def choice(self) -> ToolChoice | CalledName:
        """The choice, or the function that it is."""
        return self.tool_choice

    def echoed_tools(self) -> dict[str, Any]:
        """The fields that the response tells again."""
        choice = self.tool_choice
        told = {"type": choice.type, "name": choice.name} if isinstance(choice, NamedFunction) else choice
        tools = [tool.echoed() for tool in self.tools]
        return {"tools": tools, "tool_choice": told, "parallel_tool_calls": self.parallel_tool_calls}


class InputText(Tolerant):
    """A part of an item's content: what a user or a tool says, or an answer that comes back as it was sent."""

    neutral = openai_fields.INPUT_TEXT
    type: Literal["input_text", "output_text"]
    text: str


InputContent = str | Annotated[list[InputText], Field(min_length=1)]


def _known(kind: Any) -> Any:
    if kind not in ITEMS:
        raise ValueError(f"an item must be one of {', '.join(ITEMS)}")
    return kind


class InputMessage(Tolerant):
    """A turn of the input, its content whole or in parts; a message of ours may come back as it was sent."""

    neutral = openai_fields.INPUT_MESSAGE
    type: Annotated[Literal["message"], BeforeValidator(_known)] = "message"  # an item of no kind is read as one
    role: Literal["system", "developer", "user", "assistant"]
    content: InputContent

    def turn(self, _field: str, _names: Mapping[str, str]) -> ToolTurn:
        """The turn as a role that templates know, and one text."""
        return ToolTurn("system" if self.role == "developer" else self.role, _text(self.content))


class FunctionCallItem(CalledFunction):
    """A call that an answer had."""

    neutral = openai_fields.INPUT_CALL
    type: Literal["function_call"]
    call_id: CallId

    def turn(self, field: str, _names: Mapping[str, str]) -> ToolTurn:
        """The call, in an assistant's turn."""
        return ToolTurn(ASSISTANT, "", (read_call(self, self.call_id, field),))


class FunctionCallOutput(Tolerant):
    """The result of a call before it."""

    neutral = openai_fields.INPUT_RESULT
    type: Literal["function_call_output"]
    call_id: CallId
    output: InputContent

    def turn(self, field: str, names: Mapping[str, str]) -> ToolTurn:
        """The tool's turn, with the name of the function that was called."""
        name = called_name(names, self.call_id, f"{field}.call_id")
        return ToolTurn(TOOL, _text(self.output), call_id=self.call_id, name=name)


class ReasoningText(Tolerant):
    """A part of the reasoning."""

    type: Literal["reasoning_text"]
    text: str


class SummaryText(Tolerant):
    """A part of the reasoning's summary."""

    type: Literal["summary_text"]
    text: str


class ReasoningItem(Tolerant):
    """The reasoning that an answer began with, or its summary if that is all there is of it."""

    neutral = openai_fields.INPUT_REASONING
    type: Literal["reasoning"]
    content: list[ReasoningText] = Field(default_factory=list)
    summary: list[SummaryText] = Field(default_factory=list)

    def turn(self, _field: str, _names: Mapping[str, str]) -> ToolTurn:
        """The reasoning, in an assistant's turn; the template decides what it keeps."""
        return ToolTurn(ASSISTANT, "", reasoning="\n".join(part.text for part in self.content or self.summary))


def _kind(item: Any) -> str:
    kind = item.get("type") if isinstance(item, dict) else None
    return kind if kind in ITEMS else "message"


InputItem = Annotated[
    Annotated[InputMessage, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_kind),
]


def turns_of_items(items: Sequence[InputItem]) -> list[ToolTurn]:
    """The turns that items make: those of one answer are one turn. Raises `BadRequestError`, naming the field."""
    names, turns = dict[str, str](), list[ToolTurn]()
    for number, item in enumerate(items):
        turn = item.turn(f"input.{number}", names)
        names |= {call.id: call.name for call in turn.calls}
        if turns and _is_of_one_answer(turns[-1], turn):
            turns[-1] = _joined(turns[-1], turn)
        else:
            turns.append(turn)
    return turns


def _is_of_one_answer(turn: ToolTurn, item: ToolTurn) -> bool:
    """Tell whether an item goes on with a turn: it begins with reasoning, and has calls between texts."""
    if turn.role != ASSISTANT or item.role != ASSISTANT:
        return False
    if item.reasoning:
        return not (turn.content or turn.calls)
    return bool(item.calls or turn.calls) or not turn.content


def _joined(turn: ToolTurn, item: ToolTurn) -> ToolTurn:
    return turn._replace(
        content="\n".join(filter(None, (turn.content, item.content))),
        calls=turn.calls + item.calls,
        reasoning="\n".join(filter(None, (turn.reasoning, item.reasoning))),
    )


def _text(content: InputContent) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
