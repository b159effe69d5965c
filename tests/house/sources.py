"""The source files of the three packages and of the tests, each read and parsed once."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).parents[2]
PACKAGES = ("adapters_store", "server", "training")
Node = TypeVar("Node", bound=ast.AST)
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def files(*folders: str) -> list[Path]:
    """List the Python files below folders of the tree, sorted."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert found, f"{folders} hold no Python files"
    return found


@cache
def parsed(path: Path) -> ast.Module:
    """Parse a file."""
    return ast.parse(path.read_text())


def name_of(path: Path) -> str:
    """Give a file's path from the root of the tree, as tables and messages name it."""
    return path.relative_to(ROOT).as_posix()


def nodes(kind: type[Node], *folders: str) -> Iterator[tuple[Path, Node]]:
    """Give every syntax node of a kind, with its file."""
    for path in files(*folders):
        yield from ((path, node) for node in ast.walk(parsed(path)) if isinstance(node, kind))
