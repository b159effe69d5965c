"""Forms of answers as requests name them: turned into a grammar, and compiled once at the door, within bounds.

The door has no tokenizer of the base's. It compiles over single bytes, which finds what is wrong with a form itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from adapters_store.form import (
    MAX_FORM_BYTES,
    FormError,
    byte_tokenizer,
    compile_grammar,
    kind_and_value,
    num_bytes_of,
    write_grammar,
)
from adapters_store.format.manifest import TaskForm
from server.core import FormSpec
from server.errors import UnsupportedSchemaError

MAX_PROPERTIES = 256  # of one object: the work grows with their square
MAX_CHOICES = 4096
MAX_SAID = 400  # characters of a reason
SPECIAL = re.compile(r"<\[\d+\]>")  # a token of the base's, in the grammar of parts
SOURCE = re.compile(r"\n\s*\d+ \|")  # begins the lines of a grammar that llguidance shows, which are partly ours
BLAMED = (  # what llguidance says, and the keyword and value that it says it of
    (re.compile(r'Unimplemented keys: \["([^"]+)"'), None),
    (re.compile(r"Unknown format: (.+)"), "format"),
    (re.compile(r"Invalid type: (.+)"), "type"),
    (re.compile(r"Pointer '(.+)' does not exist"), "$ref"),
    (re.compile(r"Resource '(.+)' is not present"), "$ref"),
    (re.compile(r"(oneOf) constraints"), None),
)


def of_task(form: TaskForm) -> FormSpec:
    """The form that a manifest carries."""
    return FormSpec(*kind_and_value(form), "form.schema" if form.labels is None else "form.labels")


def grammar_of(form: FormSpec, lead: str = "") -> str:
    """A form, behind `lead` or not, as a grammar of llguidance's, compiled once to see that it can be.

    Raises `UnsupportedSchemaError`, which names the keyword of a schema by its JSON pointer.
    """
    _check_size(form)
    try:
        grammar = write_grammar(form.kind, form.value, lead)
        compile_grammar(byte_tokenizer(), SPECIAL.sub("<[1]>", grammar) if form.kind == "parts" else grammar)
    except (FormError, ValueError) as error:
        said = " ".join(SOURCE.split(str(error))[0].split())[:MAX_SAID]
        raise UnsupportedSchemaError(f"{form.field} cannot be served: {said}", _blamed(form, said)) from None
    return grammar


def _check_size(form: FormSpec) -> None:
    if (num_bytes := num_bytes_of(form.value)) > MAX_FORM_BYTES:
        raise UnsupportedSchemaError(
            f"{form.field} has {num_bytes} bytes, and a form may have {MAX_FORM_BYTES}", form.field
        )
    if form.kind == "choice" and len(form.value) > MAX_CHOICES:
        raise UnsupportedSchemaError(
            f"{form.field} lists {len(form.value)} texts, and a choice may have {MAX_CHOICES}", form.field
        )
    for pointer, part in _parts(form.value) if form.kind == "json_schema" else ():
        if len(part) > MAX_PROPERTIES:
            message = f"{form.field} has {len(part)} members at {pointer or 'its root'}, and an object may have"
            raise UnsupportedSchemaError(f"{message} {MAX_PROPERTIES}", f"{form.field}#{pointer}")


def _blamed(form: FormSpec, said: str) -> str:
    """The field, and the JSON pointer of the keyword that llguidance's sentence is about, if it is about one."""
    if form.kind != "json_schema":
        return form.field
    for pattern, keyword in BLAMED:
        if found := pattern.search(said):
            name, value = keyword or found[1], found[1].strip() if keyword else None
            for pointer, part in _parts(form.value):
                if name in part and (value is None or str(part[name]).lstrip("#") == value.lstrip("#")):
                    return f"{form.field}#{pointer}/{_escaped(name)}"
    return form.field


def _parts(value: Any, pointer: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects within a JSON value, each with its JSON pointer."""
    if isinstance(value, dict):
        yield pointer, value
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, member in members:
        yield from _parts(member, f"{pointer}/{_escaped(str(name))}")


def _escaped(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
