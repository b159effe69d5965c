"""Schemas of arguments: what kinds of values they name, and the definitions that they refer to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MAX_REFERENCES = 16  # from one to the next
DEFINITIONS = ("$defs", "definitions")
SHARED = tuple(f"#/{word}/" for word in DEFINITIONS)


def with_definitions(part: Any, schema: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a schema that can stand alone; `true` and what is no schema name nothing."""
    shared = {word: schema[word] for word in DEFINITIONS if word in schema}
    return {**(part if isinstance(part, Mapping) else {}), **shared}


def resolved(schema: Any) -> Mapping[str, Any]:
    """A schema with the definition that it refers to in the place of the reference, if it is one of its own."""
    found = schema if isinstance(schema, Mapping) else {}
    for _ in range(MAX_REFERENCES):
        place = next((word for word in SHARED if str(found.get("$ref")).startswith(word)), None)
        definitions = found.get(place[2:-1]) if place else None
        target = definitions.get(found["$ref"].removeprefix(place)) if isinstance(definitions, Mapping) else None
        if not isinstance(target, Mapping):
            break
        found = {**target, **{word: value for word, value in found.items() if word != "$ref"}}
    return found


def listed_in(schema: Mapping[str, Any]) -> list[Any]:
    """The values that a schema lists; none if it does not."""
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    return values if isinstance(values, list) else []


def kinds_of(schema: Any) -> set[str]:
    """The types that a schema names."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    kinds = {kind for kind in [named, *_listed(named)] if isinstance(kind, str)}
    kinds |= {_kind_of(value) for value in listed_in(schema)}
    return kinds.union(*(kinds_of(one) for word in ("anyOf", "oneOf", "allOf") for one in _listed(schema.get(word))))


def is_of_kind(value: Any, schema: Any) -> bool:
    """Tell whether a value is of a type that a schema names, if it names any."""
    kinds, kind = kinds_of(schema), _kind_of(value)
    return not kinds or kind in kinds or (kind == "integer" and "number" in kinds)


def _kind_of(value: Any) -> str:
    named = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return named.get(type(value), "null")


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
