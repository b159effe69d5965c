"""Wire models: bodies of requests, and parts that several answers share."""

from __future__ import annotations

import secrets
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, model_validator
from pydantic_core import CoreSchema

from adapters_store.base.spec import ItemBytes
from adapters_store.registry.registry import Version
from server.core import FormSpec, FreeForm, Sampling
from server.errors import BadRequestError

NAME_PATTERN = r"^[a-z0-9][a-z0-9_-]{0,62}$"
BASE = "base"
MAX_PROMPTS = 64
MAX_CONTINUATIONS = 256
MAX_SCORED_TOP = 20  # alternatives of a prompt's token
MAX_TURNS = 4096
MAX_STOP_TOKENS = 256
MAX_ROUTED = 64  # versions of a route
MIN_TEMPERATURE = 1e-3  # logits divided by less would not be finite: less is greedy

JsonSchema = dict[str, Any]
Choices = Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
TaskName = Annotated[str, Field(pattern=NAME_PATTERN)]
TokenIds = list[Annotated[int, Field(ge=0)]]
Continuation = Annotated[str, Field(min_length=1)] | Annotated[TokenIds, Field(min_length=1)]
Stop = Annotated[str, Field(min_length=1, max_length=64)]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,8}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(max_length=1024),  # it is applied anew at each step
]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
User = Annotated[str, Field(max_length=512)]  # a sticky route gives each user the same version; not used otherwise


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") == "list":
            schema["fail_fast"] = True
        for part in schema.values():
            _fail_fast(part)
    elif isinstance(schema, list | tuple):
        for part in schema:
            _fail_fast(part)


def has_field(name: str) -> dict[str, Any]:
    """The schema of a body that has a field, which is not null."""
    return {"required": [name], "properties": {name: {"not": {"type": "null"}}}}


class Strict(BaseModel):
    """A model for which unknown fields and wrong types are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: type[BaseModel], handler: GetCoreSchemaHandler, /) -> CoreSchema:
        """Let every list end at its first error: a body of a million wrong items would have millions of them."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @classmethod
    def unknown(cls, field: str) -> str:
        """Refuse a field that the model does not have, in a sentence; say which one it may have been meant for."""
        near = get_close_matches(field, cls.model_fields, 1)
        return f"unknown field {field}" + (f": did you mean {near[0]}?" if near else "")


class WeightedTask(Strict):
    """A task among several whose adapters are composed, and its weight."""

    task: TaskName
    weight: float = Field(1.0, ge=-100, le=100)


WeightedTasks = Annotated[list[WeightedTask], Field(min_length=1, max_length=8)]


class SamplingFields(Strict):
    """Sampling parameters; the same names as everywhere in the field."""

    temperature: float = Field(0.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=2**31)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: LogitBias = Field(default_factory=dict)
    seed: Seed | None = None
    ignore_eos: bool = False
    stop_token_ids: Annotated[TokenIds, Field(max_length=MAX_STOP_TOKENS)] = Field(default_factory=list)

    def sampling(self) -> Sampling:
        """The engine's form of these fields; a seed is drawn if none was given."""
        values = {name: getattr(self, name) for name in SamplingFields.model_fields}
        values["logit_bias"] = {int(token): value for token, value in self.logit_bias.items()}
        values["stop_token_ids"] = tuple(self.stop_token_ids)
        values["seed"] = secrets.randbits(63) if self.seed is None else self.seed
        values["temperature"] = self.temperature if self.temperature >= MIN_TEMPERATURE else 0.0
        return Sampling(**values)


class AdapterFields(Strict):
    """The adapters that answer, and until when."""

    adapters: WeightedTasks | None = None
    version: int | None = Field(None, ge=1)
    user: User | None = None
    timeout_s: float = Field(120.0, gt=0, le=3600)

    def resolvable(self, task: str | None) -> dict[str, Any]:
        """Return these as fields of a spec. Raises `BadRequestError` if no task is named, or two sets of adapters."""
        if self.adapters is None and not task:  # the base, too, is asked for by name
            raise BadRequestError("name a task: ?task=NAME (task=base is the base itself)", "task")
        if self.adapters is not None and (task is not None or self.version is not None):
            raise BadRequestError("give either ?task= (with version), or adapters, not both", "adapters")
        return {
            "task": task or "",
            "version": self.version,
            "adapters": None if self.adapters is None else [(one.task, one.weight) for one in self.adapters],
            "user": self.user,
            "timeout_s": self.timeout_s,
        }


def form_of_object(schema: JsonSchema | None, field: str, part: str = "") -> FormSpec:
    """The form of any JSON object, or of what fits the schema in a part of the field."""
    if schema is None:
        return FormSpec("json_schema", {"type": "object"}, field)
    return FormSpec("json_schema", schema, f"{field}.{part}")


class FreeText(Strict):
    """Text in no form at all."""

    type: Literal["text"]

    def form(self, _field: str) -> FreeForm:
        """Return the word for free text."""
        return FreeForm()


class AnyObject(Strict):
    """Any JSON object, or what fits the schema `value`, as Hugging Face's client sends it."""

    type: Literal["json_object"]
    value: JsonSchema | None = None

    def form(self, field: str) -> FormSpec:
        """The form of any JSON object, or of the schema."""
        return form_of_object(self.value, field, "value")


class NamedSchema(Strict):
    """A JSON schema as OpenAI's API carries it. Answers fit it also if it is not `strict`."""

    name: Annotated[str, Field(max_length=64)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    json_schema: JsonSchema = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Strict):
    """JSON that fits a schema: in OpenAI's form, or the schema itself beside the type."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [has_field("json_schema"), has_field("schema")]})
    type: Literal["json_schema"]
    json_schema: NamedSchema | None = None
    plain: JsonSchema | None = Field(None, alias="schema")

    @model_validator(mode="after")
    def _one_schema(self) -> Self:
        if (self.json_schema is None) == (self.plain is None):
            raise ValueError("give a schema, in json_schema or beside the type")
        return self

    def form(self, field: str) -> FormSpec:
        """The form of the schema."""
        if self.json_schema is not None:
            return FormSpec("json_schema", self.json_schema.json_schema, f"{field}.json_schema.schema")
        return FormSpec("json_schema", self.plain, f"{field}.schema")


class RegexFormat(Strict):
    """Text that matches a regular expression as a whole."""

    type: Literal["regex"]
    regex: Annotated[str, Field(min_length=1)]

    def form(self, field: str) -> FormSpec:
        """The form of the expression."""
        return FormSpec("regex", self.regex, f"{field}.regex")


class ChoiceFormat(Strict):
    """Text that is one of some texts."""

    type: Literal["choice"]
    choices: Choices

    def form(self, field: str) -> FormSpec:
        """The form of the choice."""
        return FormSpec("choice", self.choices, f"{field}.choices")


class GrammarFormat(Strict):
    """Text that a grammar in Lark's form makes."""

    type: Literal["grammar"]
    grammar: Annotated[str, Field(min_length=1)]

    def form(self, field: str) -> FormSpec:
        """The form of the grammar."""
        return FormSpec("grammar", self.grammar, f"{field}.grammar")


ResponseFormat = Annotated[
    FreeText | AnyObject | SchemaFormat | RegexFormat | ChoiceFormat | GrammarFormat, Field(discriminator="type")
]


class ScoreRequest(AdapterFields):
    """The body of POST /score."""

    model_config = ConfigDict(json_schema_extra={"oneOf": [has_field("prompt"), has_field("prompt_token_ids")]})
    prompt: str | None = None
    prompt_token_ids: Annotated[TokenIds, Field(min_length=1)] | None = None
    continuations: Annotated[list[Continuation], Field(min_length=1, max_length=MAX_CONTINUATIONS)]
    logprobs: bool = False

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.prompt_token_ids is None):
            said = "none of them" if self.prompt is None else "both"
            raise BadRequestError(f"give exactly one of prompt, prompt_token_ids: this has {said}", "prompt")
        return self


class RouteRequest(Strict):
    """The body of PUT /tasks/{task}/route: {version number as text: weight}, of any sum."""

    versions: Annotated[
        dict[Annotated[str, Field(pattern=r"^[1-9][0-9]{0,17}$")], Annotated[float, Field(gt=0, le=1e6)]],
        Field(min_length=1, max_length=MAX_ROUTED),
    ]
    sticky: Literal["user"] | None = None


class PinRequest(Strict):
    """The body of PUT /tasks/{task}/pin."""

    pinned: bool


def openapi_body(*models: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI entry for a body that FastAPI does not parse itself, which is any of these."""
    schemas = [model.model_json_schema() for model in models]
    found = [_inlined(schema, schema.pop("$defs", {})) for schema in schemas]
    content = {"application/json": {"schema": found[0] if len(found) == 1 else {"anyOf": found}}}
    return {"requestBody": {"required": True, "content": content}}


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    """A schema without references, which would be looked for at the root of the OpenAPI document.

    Names that fit no pattern are refused, which Pydantic does not say.
    """
    if isinstance(schema, list):
        return [_inlined(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    closed = {"additionalProperties": False} if "patternProperties" in schema else {}
    inlined = {key: _inlined(value, definitions) for key, value in schema.items()} | closed
    if "mapping" in inlined.get("discriminator", {}):  # it refers to the definitions; each branch says its own type
        del inlined["discriminator"]
    return inlined


def identity(version: Version, item_bytes: ItemBytes | None) -> dict[str, Any]:
    """A version's identity and sizes: bytes of its files and of a slot (None: not known yet), tokens of a sequence."""
    return {
        "version": version.number,
        "digest": version.digest,
        "method": version.method,
        "num_parameters": version.num_parameters,
        "bytes": version.num_bytes,
        "slot_bytes": None if item_bytes is None else item_bytes.of(version),
        "virtual_tokens": version.num_virtual,
    }
