"""Forms of answers as grammars of llguidance: how each kind is written, and compiled within bounds.

llguidance's limits bound the work of a form at each place: what a hostile one costs is cut off.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from, regex_to_lark

from adapters_store.format.manifest import TaskForm

Kind = Literal["json_schema", "regex", "choice", "grammar", "parts"]  # parts: of an answer, in llguidance's Lark
MAX_FORM_BYTES = 64 * 2**10
MAX_LEXER_STATES = 20_000  # 1 to 2 kB each
MAX_GRAMMAR_SYMBOLS = 100_000
STEP_FUEL, STEP_ITEMS = 50_000, 20_000  # 4 ms and 1 ms of a step at most
# Without it the bytes that must follow are worked out in one go, and a form can ask for a million of them in a step.
OPTIONS = '%llguidance {"no_forcing": true}'
JSON_OPTIONS = {  # over what a schema's `x-guidance` says; a separator is a regular expression
    "whitespace_flexible": False,  # or an answer could be white space without end
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}


class FormError(Exception):
    """A form that cannot be served, or that no token of the base fits any more; the sentence is for users."""


def kind_and_value(form: TaskForm) -> tuple[Kind, Any]:
    """The form that a manifest carries, as the kind and the value of `write_grammar`."""
    return ("json_schema", form.schema) if form.labels is None else ("choice", list(form.labels))


def num_bytes_of(value: Any) -> int:
    """The bytes of a form's value, of which a server takes `MAX_FORM_BYTES`."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return len(text.encode())


@cache
def byte_tokenizer() -> LLTokenizer:
    """A tokenizer of single bytes, over which a form is tried without the base's own."""
    return LLTokenizer("byte")


def lead_before(kind: Kind, value: Any, lead: str) -> str:
    """The text that may stand before a form and is no part of it: none before one that may begin with it itself."""
    is_other = kind == "json_schema" or (kind == "choice" and not any(text.startswith(lead) for text in value))
    return lead if is_other else ""


def write_grammar(kind: Kind, value: Any, lead: str = "") -> str:
    """A form in llguidance's dialect of Lark, behind `lead` or not.

    Raises `FormError` for what a grammar may not say, and `ValueError`.
    """
    before = f"{json.dumps(lead, ensure_ascii=False)}? " if lead_before(kind, value, lead) else ""
    return f"{OPTIONS}\n{_rules(kind, value, before)}"


def nested(kind: Kind, value: Any) -> str:
    """A form as a part of another grammar. Raises as `write_grammar`."""
    return f"%lark {{\n{_rules(kind, value)}\n}}"


def json_value(schema: Any) -> str:
    """A value that fits a schema, as a part of a grammar."""
    options = {**schema, "x-guidance": JSON_OPTIONS} if isinstance(schema, Mapping) else schema
    return f"%json {json.dumps(options)}"


def _rules(kind: Kind, value: Any, before: str = "") -> str:
    match kind:
        case "json_schema":
            return f"start: {before}{json_value(value)}"
        case "regex":
            return f"start: /{regex_to_lark(value)}/"
        case "choice":
            texts = " | ".join(json.dumps(text, ensure_ascii=False) for text in value)
            return f"start: {before}CHOICE\nCHOICE: {texts}"
        case "grammar":
            if "%llguidance" in value:
                raise FormError("a grammar may not set %llguidance")
            written: str = grammar_from("grammar", value)
            return written.replace("%llguidance {}", "")
        case "parts":
            return str(value)


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """Compile a grammar of llguidance's, without holding the interpreter. Raises `FormError`."""
    limits = LLParserLimits(
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SYMBOLS,
        step_lexer_fuel=STEP_FUEL,
        step_max_items=STEP_ITEMS,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    matcher.compute_bitmask()  # what a first token needs is worked out here, and not in a step
    if matcher.is_error():
        raise FormError(error_of(matcher))
    return matcher


def error_of(matcher: LLMatcher) -> str:
    """Return what ended a matcher, without what llguidance says of itself; empty if nothing did."""
    said: str = matcher.get_error()
    return said.removesuffix("<non-verbose/>").strip()
