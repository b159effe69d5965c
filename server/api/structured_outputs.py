"""The form of an answer in OpenAI's shape, in vLLM's, and in vLLM's older one: at most one of them in a request."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from adapters_store.format.strict_json import loads
from server.api import openai_fields
from server.api.openai_fields import Tolerant
from server.core import FormSpec
from server.errors import InvalidFieldError
from server.schemas import Choices, JsonSchema, ResponseFormat


def _parsed(value: Any) -> Any:
    return loads(value) if isinstance(value, str) else value


SchemaOrText = Annotated[JsonSchema, BeforeValidator(_parsed)]  # vLLM takes a schema also as text
Text = Annotated[str, Field(min_length=1)]
OF_VLLM: dict[str, Literal["json_schema", "regex", "choice", "grammar"]] = {
    "json": "json_schema",
    "regex": "regex",
    "choice": "choice",
    "grammar": "grammar",
}


class StructuredOutputs(Tolerant):
    """vLLM's form of an answer: exactly one of its fields."""

    neutral = openai_fields.STRUCTURED_OUTPUTS
    json_: SchemaOrText | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if len(self.model_fields_set) != 1:
            raise ValueError("give exactly one of json, regex, choice, grammar, json_object")
        return self

    def form(self) -> FormSpec:
        """The form that the given field names."""
        if self.json_object:
            return FormSpec("json_schema", {"type": "object"}, "structured_outputs.json_object")
        values = {"json": self.json_, "regex": self.regex, "choice": self.choice, "grammar": self.grammar}
        name, value = next((name, value) for name, value in values.items() if value is not None)
        return FormSpec(OF_VLLM[name], value, f"structured_outputs.{name}")


class FormFields(Tolerant):
    """Fields that say the form of an answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: SchemaOrText | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    def form(self) -> FormSpec | None:
        """The form that the request names, or None for free text. Raises `InvalidFieldError` for two of them."""
        forms = [
            None if self.response_format is None else self.response_format.form("response_format"),
            None if self.structured_outputs is None else self.structured_outputs.form(),
        ]
        for name, kind in OF_VLLM.items():
            value = getattr(self, field := f"guided_{name}")
            forms.append(None if value is None else FormSpec(kind, value, field))
        given = [form for form in forms if form is not None]
        if given[1:]:
            fields = ", ".join(form.field for form in given)
            raise InvalidFieldError(f"an answer has one form, and this request names several: {fields}", given[1].field)
        return given[0] if given else None
