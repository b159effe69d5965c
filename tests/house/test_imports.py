"""Imports go one way, and few places reach for the environment or for the libraries of training."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.house.sources import PACKAGES, ROOT, files, name_of, nodes, parsed

ENVIRONMENT = {  # who touches os.environ, and why
    "adapters_store/base/cache.py": "reads the folder of what is cached, for commands that have no settings",
    "server/cli/serve.py": "tells the engine and its helpers the folder of what is cached",
    "server/cli/doctor.py": "names the variables that are no settings",
    "server/settings.py": "reads the settings, and keeps their secrets from the engine",
    "server/engine/worker.py": "sets variables of OpenMP and torch before torch is imported",
    "server/requests/without_torch.py": "sets a variable of transformers before it is imported",
    "training/compare/serving.py": "gives a server that it starts the environment without the user's own settings",
}
GIVEN_UP = {"httpx": "httpx2, which has releases"}
OF_TRAINING = ("accelerate", "matplotlib", "peft", "sacrebleu")


def module_of(path: Path) -> str:
    """Name the module that a file is."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(path): path for path in files(*PACKAGES)}


def _at_top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Give the statements that run when a module is imported, and those for type checkers; no function's."""
    for statement in body:
        yield statement
        if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            for part in ("body", "orelse", "handlers", "finalbody"):
                yield from _at_top(getattr(statement, part, []))


def imported(statement: ast.AST) -> list[str]:
    """List the modules that a statement imports; of `from a import b` both a.b and a, if that is not known."""
    match statement:
        case ast.Import(names=names):
            return [alias.name for alias in names]
        case ast.ImportFrom(module=str(module), names=names, level=0):
            whole = [f"{module}.{alias.name}" for alias in names]
            return [name if name in MODULES else module for name in whole]
    return []


def _graph() -> dict[str, set[str]]:
    """Give the modules of ours that each module imports."""
    edges = {
        name: {target for statement in _at_top(parsed(path).body) for target in imported(statement)}
        for name, path in MODULES.items()
    }
    return {name: targets & MODULES.keys() - {name} for name, targets in edges.items()}


def test_no_import_cycle() -> None:
    """No module imports itself by way of others, not even for its types."""
    graph = _graph()
    assert sum(map(len, graph.values())) > 300
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_relative_import() -> None:
    """Every import says the whole name, so that a search for a module finds its users."""
    found = [f"{name_of(path)}:{node.lineno}" for path, node in nodes(ast.ImportFrom, *PACKAGES) if node.level]
    assert not found


def test_few_places_touch_the_environment() -> None:
    """Only the settings read os.environ; each other file that touches it stands here with a reason."""
    names = {"environ", "environb", "getenv", "putenv", "unsetenv"}
    attributes = {
        name_of(path)
        for path, node in nodes(ast.Attribute, *PACKAGES)
        if node.attr in names and isinstance(node.value, ast.Name) and node.value.id == "os"
    }
    from_os = {
        name_of(path)
        for path, node in nodes(ast.ImportFrom, *PACKAGES)
        if node.module == "os" and names & {alias.name for alias in node.names}
    }
    assert attributes | from_os == set(ENVIRONMENT)


def test_serving_needs_no_library_of_training() -> None:
    """No module of the server or the store imports a library that only training needs, at any level."""
    found = [
        f"{name_of(path)}:{node.lineno} {name}"
        for kind in (ast.Import, ast.ImportFrom)
        for path, node in nodes(kind, "adapters_store", "server")
        for name in imported(node)
        if name.partition(".")[0] in OF_TRAINING
    ]
    assert not found


def test_packages_that_were_given_up_stay_away() -> None:
    """No module, of tests neither, imports a package that another one took the place of."""
    pattern = re.compile(rf"^\s*(?:import|from) ({'|'.join(GIVEN_UP)})\b", re.MULTILINE)
    found = [
        (name_of(path), match[1]) for path in files(*PACKAGES, "tests") for match in pattern.finditer(path.read_text())
    ]
    assert not found, [f"{place}: say {GIVEN_UP[name]}" for place, name in found]
