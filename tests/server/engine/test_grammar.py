"""Forms at the door: every kind becomes a grammar; what cannot be served is refused by the keyword, within bounds."""

from __future__ import annotations

import contextlib
import time
from typing import Any

import pytest

from adapters_store.form import MAX_FORM_BYTES
from server.core import FormSpec
from server.engine.grammar import MAX_CHOICES, MAX_PROPERTIES, grammar_of
from server.errors import UnsupportedSchemaError
from tests.kit.schemas import HOSTILE

SERVED: list[tuple[Any, Any]] = [
    ("json_schema", {"type": "object"}),
    ("json_schema", {"$ref": "#/$defs/a", "$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}}}}),  # recursive
    ("json_schema", {"anyOf": [{"type": "integer"}, {"enum": ["a", None]}]}),
    ("regex", "[a-z]{2,4}-[0-9]+"),
    ("regex", "((a*)*)*b"),
    ("choice", ["yes", "no", 'a "quoted"\n\\ one', "é🎩"]),
    ("choice", ["a"]),
    ("grammar", 'start: "a" rest?\nrest: "b" start'),
    ("grammar", 'root ::= "yes" | "no"'),  # llama.cpp's form, which vLLM takes, too
]
REFUSED: list[tuple[Any, Any, str, str]] = [  # kind, value, where, and a word of why
    (
        "json_schema",
        {"properties": {"a/b": {"items": {"uniqueItems": True}}}},
        "#/properties/a~1b/items/uniqueItems",
        "",
    ),
    ("json_schema", {"allOf": [{}, {"not": {}}]}, "#/allOf/1/not", "not"),
    ("json_schema", {"$ref": "#/$defs/a"}, "#/$ref", "does not exist"),
    ("json_schema", {"$ref": "http://localhost/a"}, "#/$ref", "does not fetch"),
    ("json_schema", {"type": "strin"}, "#/type", "strin"),
    ("json_schema", {"format": "wat"}, "#/format", "wat"),
    ("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf", "oneOf"),
    ("json_schema", {"uniqueItems": True, "x-guidance": {"lenient": True}}, "#/uniqueItems", "uniqueItems"),
    ("json_schema", {"pattern": "(?=a)"}, "", "look-ahead"),
    ("json_schema", {"enum": []}, "", "Unsatisfiable"),
    ("json_schema", {"$ref": "#"}, "", ""),
    ("json_schema", {"properties": {str(n): {} for n in range(MAX_PROPERTIES + 1)}}, "#/properties", "256"),
    ("json_schema", {"enum": ["x" * MAX_FORM_BYTES]}, "", "bytes"),
    ("json_schema", {"allOf": [{"anyOf": [{"required": [f"{a}{b}"]} for b in range(4)]} for a in range(9)]}, "", ""),
    ("regex", "(a", "", "unclosed"),
    ("regex", "a" * (MAX_FORM_BYTES + 1), "", "bytes"),
    ("choice", [str(n) for n in range(MAX_CHOICES + 1)], "", "4097 texts"),
    ("grammar", 'start: "a" b', "", "unknown name"),
    ("grammar", "?", "", ""),
    ("grammar", '%llguidance {"no_forcing": false}\nstart: "a"', "", "%llguidance"),
]


@pytest.mark.parametrize(("kind", "value"), SERVED, ids=str)
def test_every_kind_becomes_a_grammar(kind: Any, value: Any) -> None:
    """A form of each kind is compiled at the door."""
    assert grammar_of(FormSpec(kind, value, "f"))


@pytest.mark.parametrize(("kind", "value", "pointer", "why"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_refused_names_the_keyword(kind: Any, value: Any, pointer: str, why: str) -> None:
    """A form that is not served, has no answer or is too large is refused, a schema's by the keyword's JSON pointer."""
    with pytest.raises(UnsupportedSchemaError) as refused:
        grammar_of(FormSpec(kind, value, "f"))
    assert refused.value.param == f"f{pointer}" and why in str(refused.value)
    assert (refused.value.status, refused.value.code) == (400, "unsupported_schema") and len(str(refused.value)) < 600


@pytest.mark.parametrize(("kind", "value"), HOSTILE, ids=lambda value: str(value)[:40])
def test_a_hostile_form_is_bounded(kind: Any, value: Any) -> None:
    """The worst forms within the bounds are compiled or refused at a second of CPU at most."""
    began = time.thread_time()
    with contextlib.suppress(UnsupportedSchemaError):
        grammar_of(FormSpec(kind, value, "f"))
    assert time.thread_time() - began < 1
