"""Docstrings have one form: a sentence of at least four words that begins with a verb or with what it is about."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.house.sources import PACKAGES, files, name_of, parsed

MIN_WORDS = 4
# A first word that leaves the reader asking "of what?": a question, a pronoun, a preposition, a bare verb form.
OPENINGS = re.compile(
    r"(?:what|of|who|whose|whom|where|which|that|those|these|this|it|they|them|as|in|at|by|on|to|from|with|without|for"
    r"|and|but|or|so|if|when|while|all|some|one|nothing|none|nobody|everything|something|whoever|whatever|how|why|there"
    r"|here|like|is|are|was|were|has|have|can|may|not|no)",
    re.IGNORECASE,
)
# "where there is none" tells no place: it is a condition.
CONDITION = re.compile(
    r"\bwhere (?:it|there|they|this|that|these|those|a|an|the|no|none|nothing|one|some|something|any|what|who)\b"
)


def fault(text: str) -> str | None:
    """Name what a docstring's form lacks; None if it is as it should be."""
    words = re.findall(r"[\w`'-]+", text)
    if len(words) < MIN_WORDS:
        return f"has {len(words)} words, fewer than {MIN_WORDS}"
    if OPENINGS.fullmatch(words[0]):
        return f"opens with {words[0]!r}: begin with a verb, or with the subject"
    condition = CONDITION.search(" ".join(text.split()))
    return condition and f"has {condition[0]!r}: say 'if'"


def faults(path: Path) -> list[str]:
    """List the docstrings of a file that break the rule, each with its line and what it lacks."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(parsed(path)):
        text = ast.get_docstring(node) if isinstance(node, documented) else None
        if text is not None and (lack := fault(text)):
            name = getattr(node, "name", path.stem)
            found.append(f"{name_of(path)}:{getattr(node, 'lineno', 1)} {name} {lack}")
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_docstrings_say_what_they_are_about(package: str) -> None:
    """Every docstring has four words or more, opens with a verb or its subject, and says "if" for a condition."""
    found = [line for path in files(package) for line in faults(path)]
    assert not found, f"{len(found)} docstrings:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("text", "lack"),
    [
        ("All of it.", "3 words"),
        ("What is in the store at start.", "'What'"),
        ("Of the tenants that are here.", "'Of'"),
        ("The file's size in bytes, 0 where\n    there is none.", "'where there'"),
    ],
)
def test_the_rule_finds_a_fault(text: str, lack: str) -> None:
    """A docstring that is short, opens with a riddle, or says "where" for "if" is found."""
    assert lack in (fault(text) or "")


def test_a_plain_docstring_has_no_fault() -> None:
    """A sentence that begins with a verb is no fault, and neither is "where" of a place."""
    assert fault("Write the artifact to the folder where manifests lie.") is None
