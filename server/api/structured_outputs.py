"""The form of an answer as each dialect has it: at most one of them in a request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from adapters_store.form import Kind
from adapters_store.format.strict_json import loads
from server.api import openai_fields
from server.api.openai_fields import Tolerant
from server.core import AskedForm, FormSpec
from server.errors import InvalidFieldError
from server.schemas import AnyObject, Choices, FreeText, JsonSchema, NamedSchema, ResponseFormat, Strict, form_of_object


def _parsed(value: Any) -> Any:
    return loads(value) if isinstance(value, str) else value


SchemaOrText = Annotated[JsonSchema, BeforeValidator(_parsed)]  # vLLM takes a schema also as text
Text = Annotated[str, Field(min_length=1)]
OF_VLLM: dict[str, Kind] = {
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
            return form_of_object(None, "structured_outputs.json_object")
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

    @model_validator(mode="before")
    @classmethod
    def _null_is_free_text(cls, data: Any) -> Any:
        """Read `response_format: null` as a word against the adapter's own form: other nulls say nothing."""
        is_null = isinstance(data, dict) and data.get("response_format", "") is None
        return {**data, "response_format": {"type": "text"}} if is_null else data

    def form(self) -> AskedForm | None:
        """The form that the request names, or None. Raises `InvalidFieldError` for two of them."""
        forms: list[AskedForm | None] = [
            None if self.response_format is None else self.response_format.form("response_format"),
            None if self.structured_outputs is None else self.structured_outputs.form(),
        ]
        for name, kind in OF_VLLM.items():
            value = getattr(self, field := f"guided_{name}")
            forms.append(None if value is None else FormSpec(kind, value, field))
        return only_form(forms)


def only_form(forms: Iterable[AskedForm | None]) -> AskedForm | None:
    """Return the form among those that a request names, else its word for free text, else None.

    Raises `InvalidFieldError` for two of them.
    """
    named = [form for form in forms if form is not None]
    given = [form for form in named if isinstance(form, FormSpec)]
    if given[1:]:
        fields = ", ".join(form.field for form in given)
        raise InvalidFieldError(f"an answer has one form, and this request names several: {fields}", given[1].field)
    return given[0] if given else next(iter(named), None)


class TextSchema(NamedSchema):
    """JSON that fits a schema, as OpenAI's responses have it: named beside its type."""

    type: Literal["json_schema"]
    name: Annotated[str, Field(max_length=64)]

    def form(self, field: str) -> FormSpec:
        """The form of the schema."""
        return FormSpec("json_schema", self.json_schema, f"{field}.schema")


TextFormat = Annotated[FreeText | AnyObject | TextSchema, Field(discriminator="type")]


class JsonGrammar(Strict):
    """JSON that fits a schema, as TGI has it."""

    type: Literal["json"]
    value: SchemaOrText

    def form(self, field: str) -> FormSpec:
        """The form of the schema."""
        return FormSpec("json_schema", self.value, f"{field}.value")


class NamedGrammar(Strict):
    """JSON that fits a schema with a name, as TGI has it."""

    type: Literal["json_schema"]
    value: NamedSchema

    def form(self, field: str) -> FormSpec:
        """The form of the schema."""
        return FormSpec("json_schema", self.value.json_schema, f"{field}.value.schema")


class RegexGrammar(Strict):
    """Text that matches a regular expression, as TGI has it."""

    type: Literal["regex"]
    value: Text

    def form(self, field: str) -> FormSpec:
        """The form of the expression."""
        return FormSpec("regex", self.value, f"{field}.value")


class LoraxObject(Strict):
    """A JSON object, as LoRAX has it: any, or one that fits a schema."""

    type: Literal["json_object"]
    json_schema: JsonSchema | None = Field(None, alias="schema")

    def form(self, field: str) -> FormSpec:
        """The form of any JSON object, or of the schema."""
        return form_of_object(self.json_schema, field, "schema")


Grammar = Annotated[JsonGrammar | NamedGrammar | RegexGrammar, Field(discriminator="type")]
LoraxFormat = Annotated[FreeText | LoraxObject, Field(discriminator="type")]
