"""Tools in OpenAI's shape: the fields of a request and of its messages, and the turns that these make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from adapters_store.format.strict_json import StrictJSONError, loads
from adapters_store.tools.formats import ToolCall
from adapters_store.tools.parser import CallPart
from adapters_store.tools.turns import NO_ARGUMENTS, TOOL, AnyTurn, ToolTurn
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
        return {"name": self.name, **described, "parameters": self.parameters or NO_ARGUMENTS}


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


ToolChoice = Literal["none", "auto", "required"]


class FunctionFields(Strict):
    """The functions of a request, and whether the answer is to call them; its subclasses say how a body has them."""

    parameters_field: ClassVar[str]  # of a tool, for errors
    parallel_tool_calls: bool = True

    def functions(self) -> Sequence[FunctionDefinition]:
        """The functions that may be called, in order."""
        raise NotImplementedError

    def choice(self) -> ToolChoice | CalledName:
        """Whether there must be a call, and of which function."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _different_names(self) -> Self:
        names = [function.name for function in self.functions()]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise InvalidFieldError(f"tools: two functions are named {twice}: a call could mean either", "tools")
        return self

    @model_validator(mode="after")
    def _chosen_function_is_there(self) -> Self:
        choice = self.choice()
        if choice in ("none", "auto"):
            return self
        if not self.functions():
            raise InvalidFieldError("tool_choice: there are no tools to call: send some in tools", "tool_choice")
        if isinstance(choice, CalledName) and choice.name not in [function.name for function in self.functions()]:
            raise InvalidFieldError(f"tool_choice names the function {choice.name}, which tools lack", "tool_choice")
        return self

    def called(self) -> dict[str, Any]:
        """The functions as fields of a spec; none if the answer may not call any."""
        choice = self.choice()
        functions = [] if choice == "none" else self.functions()
        named = choice.name if isinstance(choice, CalledName) else ""
        return {
            "tools": [function.tool() for function in functions],
            "parameters_field": self.parameters_field,
            "must_call": None if choice in ("none", "auto") else named,
            "is_strict": any(function.strict for function in functions),
            "is_parallel": self.parallel_tool_calls,
        }


class ToolFields(FunctionFields):
    """The tools of a request in a chat's shape, and whether the answer is to call them."""

    parameters_field = "function.parameters"
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice | NamedTool = "auto"

    def functions(self) -> Sequence[FunctionDefinition]:
        """The functions of the tools."""
        return [tool.function for tool in self.tools]

    def choice(self) -> ToolChoice | CalledName:
        """The choice, or the function that it names."""
        return self.tool_choice.function if isinstance(self.tool_choice, NamedTool) else self.tool_choice


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
            read_call(call.function, call.id, f"messages.{number}.tool_calls.{index}.function")
            for index, call in enumerate(message.tool_calls)
        )
        names |= {call.id: call.name for call in calls}
        call_id = message.tool_call_id or ""
        name = called_name(names, call_id, f"messages.{number}.tool_call_id") if message.role == TOOL else ""
        role = "system" if message.role == "developer" else message.role
        turns.append(ToolTurn(role, message.text, calls, call_id, name, message.reasoning_content or ""))
    return turns


def read_call(function: CalledFunction, call_id: str, field: str) -> ToolCall:
    """The call that a request has in a field. Raises `BadRequestError` for arguments that are no JSON object."""
    try:
        arguments = loads(function.arguments or "{}")
    except StrictJSONError as error:
        raise BadRequestError(f"{field}.arguments is not JSON: {error}", f"{field}.arguments") from None
    if not isinstance(arguments, dict):
        raise BadRequestError(f"{field}.arguments must be a JSON object", f"{field}.arguments")
    return ToolCall(function.name, arguments, call_id)


def called_name(names: Mapping[str, str], call_id: str, field: str) -> str:
    """The function that was called, by the call's id in a field. Raises `BadRequestError` if there is none."""
    if call_id not in names:
        raise BadRequestError(f"{field} is of no call in an assistant's turn before it", field)
    return names[call_id]


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
