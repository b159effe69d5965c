"""Schemas and other forms: drawn by chance, with short values so that answers end, and the worst that there are."""

from __future__ import annotations

import json
import random
from typing import Any

from server.engine.grammar import MAX_CHOICES, MAX_PROPERTIES

LEAVES = ("integer", "number", "enum", "string", "pattern", "format", "boolean", "const")
NODES = ("object", "map", "array", "tuple", "anyOf")
ROOTS = (*NODES, "reference")
MAX_DEPTH = 2


def schema_of(chance: random.Random, depth: int = 0) -> dict[str, Any]:
    """Draw a schema; at the root one that has others within."""
    kind = chance.choice(ROOTS if not depth else LEAVES + NODES if depth < MAX_DEPTH else LEAVES)
    return _leaf(chance, kind) if kind in LEAVES else _node(chance, kind, depth)


def _leaf(chance: random.Random, kind: str) -> dict[str, Any]:
    low, high = chance.randrange(-20, 0), chance.randrange(1, 500)
    drawn: dict[str, dict[str, Any]] = {
        "integer": {"type": "integer", "minimum": low, "maximum": high},
        "number": {"type": "number", "exclusiveMinimum": low, "maximum": 9.5, "multipleOf": 0.5},
        "enum": {"enum": chance.sample(["a", "bc", 'd"e', "é", None, 7, True, 2.5], 3)},
        "string": {"type": "string", "minLength": chance.randrange(3), "maxLength": chance.randrange(3, 6)},
        "pattern": {"type": "string", "pattern": chance.choice(["^[a-c]{1,4}$", "^x(-[0-9]{2}){0,2}$", "^(yes|no)$"])},
        "format": {"type": "string", "format": chance.choice(["date", "uuid", "ipv4"])},
        "boolean": {"type": ["boolean", "null"]},
        "const": {"const": chance.choice([1, "x", [1, {"a": None}]])},
    }
    return drawn[kind]


def _node(chance: random.Random, kind: str, depth: int) -> dict[str, Any]:
    first, second = (schema_of(chance, depth + 1) for _ in range(2))
    match kind:
        case "array":
            return {"type": "array", "items": first, "minItems": 1, "maxItems": 3}
        case "tuple":
            return {"type": "array", "prefixItems": [first, second], "items": False, "minItems": 2}
        case "map":
            values = {"^[a-c]{1,2}$": first}
            return {"type": "object", "patternProperties": values, "additionalProperties": False, "maxProperties": 2}
        case "anyOf":
            return {"anyOf": [first, second]}
        case "reference":
            part = {"$defs": {"part": schema_of(chance, MAX_DEPTH)}}
            return {**part, **object_of(chance, depth, {"$ref": "#/$defs/part"})}
    return object_of(chance, depth)


def object_of(chance: random.Random, depth: int = 0, part: dict[str, Any] | None = None) -> dict[str, Any]:
    """Draw the schema of an object without other members; `part` is the schema of all that it lists, if given."""
    names = chance.sample(["name", "n", "a_b", "ü"], chance.randrange(1, 4))
    properties = {name: part or schema_of(chance, depth + 1) for name in names}
    required = names[: chance.randrange(len(names) + 1)]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


HOSTILE: list[tuple[Any, Any]] = [  # kind and value of the worst forms within the bounds
    ("regex", "(a{1,100}){1,100}"),
    ("regex", "(a{1000}){1000}"),
    ("regex", "a{100000}{100000}"),
    ("json_schema", {"minItems": 1000, "items": {"const": "x" * 1000}, "type": "array"}),
    ("regex", "(.*a.{30}){1,3}"),
    ("regex", "(a|b|ab)*c" * 200),
    ("choice", [f"{n * 2654435761 % 2**32:x}" for n in range(MAX_CHOICES)]),
    ("json_schema", {"properties": {f"p{n}": {} for n in range(MAX_PROPERTIES)}}),
    ("json_schema", {"enum": [f"{n:020}" for n in range(2500)]}),
    ("json_schema", {"pattern": "^(a|b)*a(a|b){20}$"}),
    (
        "json_schema",
        {"$ref": "#/$defs/0", "$defs": {str(n): {"items": {"$ref": f"#/$defs/{(n + 1) % 200}"}} for n in range(200)}},
    ),
    ("json_schema", json.loads('{"items":' * 25 + "{}" + "}" * 25)),
    ("grammar", "start: a0\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(40)) + 'a40: "x"'),
    ("grammar", 'start: s\ns: s s | "a" |'),
]
