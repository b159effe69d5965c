"""Tools in OpenAI's shape: the fields of a request and of its messages, and the turns that these make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from adapters_store.format.strict_json import StrictJSONError, loads
from adapters_store.tools.formats import ToolCall
from adapters_store.tools.parser import CallPart
from adapters_store.tools.turns import TOOL, AnyTurn, ToolTurn
from server.api import openai_fields
from server.api.openai_fields import Tolerant
from server.errors import BadRequestError, InvalidFieldError
from server.schemas import Strict

MAX_TOOLS = 128
MAX_CALLS = 128  # of a turn
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
CallId = Annotated[str, Field(min_length=1, max_length=64)]


class FunctionDefinition(Tolerant):
    """A function that may be called; `parameters` is the JSON schema of its arguments, an object."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _takes_an_object(self) -> Self:
        schema = self.parameters or {}
        properties, required = schema.get("properties", {}), schema.get("required", [])
        if schema.get("type", "object") != "object":
            raise ValueError("parameters must be the schema of an object")
        if not isinstance(properties, dict) or not all(isinstance(one, dict | bool) for one in properties.values()):
            raise ValueError("properties of parameters must be an object of schemas")
        if not isinstance(required, list) or not all(isinstance(one, str) for one in required):
            raise ValueError("required of parameters must be a list of names")
        return self

    def tool(self) -> dict[str, Any]:
        """The function as the model reads it; without parameters it takes none."""
        described = {} if self.description is None else {"description": self.description}
        return {"name": self.name, **described, "parameters": self.parameters or {"type": "object", "properties": {}}}


class Tool(Tolerant):
    """A tool of the only kind that there is."""

    type: Literal["function"]
    function: FunctionDefinition


class CalledName(Tolerant):
    """The name of a function that must be called."""

    name: FunctionName


class NamedTool(Tolerant):
    """A tool that must be called."""

    type: Literal["function"]
    function: CalledName


class CalledFunction(Tolerant):
    """A function that was called, and its arguments as JSON text."""

    name: FunctionName
    arguments: str


class MessageCall(Tolerant):
    """A call in an assistant's turn, as an answer had it."""

    id: CallId
    type: Literal["function"] = "function"
    function: CalledFunction


class ToolFields(Strict):
    """The tools of a request, and whether the answer is to call them."""

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _different_names(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InvalidFieldError(f"tools: two functions are named {twice}: a call could mean either", "tools")
        return self

    @model_validator(mode="after")
    def _chosen_tool_is_there(self) -> Self:
        if self.tool_choice in ("none", "auto"):
            return self
        if not self.tools:
            raise InvalidFieldError("tool_choice: there are no tools to call: send some in tools", "tool_choice")
        if isinstance(self.tool_choice, NamedTool):
            named = self.tool_choice.function.name
            if named not in [tool.function.name for tool in self.tools]:
                raise InvalidFieldError(f"tool_choice names the function {named}, which tools lack", "tool_choice")
        return self

    def called(self) -> dict[str, Any]:
        """The tools as fields of a spec; none if the answer may not call any."""
        functions = [] if self.tool_choice == "none" else [tool.function for tool in self.tools]
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else ""
        return {
            "tools": [function.tool() for function in functions],
            "must_call": None if self.tool_choice in ("none", "auto") else named,
            "is_strict": any(function.strict for function in functions),
            "is_parallel": self.parallel_tool_calls,
        }


class TextPart(Tolerant):
    """A part of a turn's content."""

    neutral = openai_fields.TEXT_PART
    type: Literal["text"]
    text: str


class TurnFields(Strict):
    """The fields of a turn; its subclasses say who may speak, and how the text is given."""

    role: str
    content: Any = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[MessageCall], Field(max_length=MAX_CALLS)] = Field(default_factory=list)
    tool_call_id: CallId | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        return str(self.content or "")


class Message(TurnFields):
    """A chat turn: who speaks, and the text; an assistant's may have calls, whose results are turns of the tool."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None


class ChatMessage(Tolerant, TurnFields):
    """A chat turn, its content whole or in parts; a turn of ours may come back as it was sent."""

    neutral = openai_fields.MESSAGE
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[TextPart], Field(min_length=1)] | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


def turns_of(messages: Sequence[TurnFields]) -> list[AnyTurn]:
    """The turns that messages make. Raises `BadRequestError` for what cannot be in one, naming the field."""
    names, turns = dict[str, str](), list[AnyTurn]()
    for number, message in enumerate(messages):
        _check_fields(message, f"messages.{number}")
        calls = tuple(
            _call(call, f"messages.{number}.tool_calls.{index}") for index, call in enumerate(message.tool_calls)
        )
        names |= {call.id: call.name for call in calls}
        call_id = message.tool_call_id or ""
        if message.role == TOOL and call_id not in names:
            field = f"messages.{number}.tool_call_id"
            raise BadRequestError(f"{field} is of no call in an assistant's turn before it", field)
        role = "system" if message.role == "developer" else message.role
        turns.append(
            ToolTurn(role, message.text, calls, call_id, names.get(call_id, ""), message.reasoning_content or "")
        )
    return turns


def call_of(part: CallPart) -> dict[str, Any]:
    """A call of an answer in OpenAI's shape."""
    return {"id": part.id, "type": "function", "function": {"name": part.name, "arguments": part.arguments}}


def _check_fields(message: TurnFields, place: str) -> None:
    """Refuse fields that a turn of another role has, and a turn without those that it needs."""
    for field, role in (("tool_calls", "assistant"), ("reasoning_content", "assistant"), ("tool_call_id", TOOL)):
        if getattr(message, field) and message.role != role:
            reason = f"belongs to a turn of the role {role}, not {message.role}"
            raise InvalidFieldError(f"{place}.{field} {reason}", f"{place}.{field}")
    if message.role == TOOL and message.tool_call_id is None:
        reason = "is missing: a turn of the role tool has that of the call that it answers"
        raise InvalidFieldError(f"{place}.tool_call_id {reason}", f"{place}.tool_call_id")
    if message.content is None and not message.tool_calls:
        reason = "is missing: only an assistant's turn that has tool_calls needs none"
        raise InvalidFieldError(f"{place}.content {reason}", f"{place}.content")


def _call(call: MessageCall, field: str) -> ToolCall:
    try:
        arguments = loads(call.function.arguments or "{}")
    except StrictJSONError as error:
        raise BadRequestError(
            f"{field}.function.arguments is not JSON: {error}", f"{field}.function.arguments"
        ) from None
    if not isinstance(arguments, dict):
        raise BadRequestError(f"{field}.function.arguments must be a JSON object", f"{field}.function.arguments")
    return ToolCall(call.function.name, arguments, call.id)
